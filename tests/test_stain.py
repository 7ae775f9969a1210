"""Stain jitter agrees with scikit-image's colour deconvolution, and without strength nothing happens."""

import numpy as np
import pytest
from skimage.color import hed2rgb, rgb2hed
from skimage.color.colorconv import hed_from_rgb, rgb_from_hed

from mad.config.views import PhotometricConfig
from mad.training import stain, views

# scikit-image's amount of each stain per optical density, of which black has 6
UNIT = 1 / np.linalg.norm(rgb_from_hed, axis=1) / 6


def stained(seed=0, side=48):
    """Pixels that are mixtures of the three stains, none negative."""
    amounts = np.random.default_rng(seed).uniform(0.0, [0.09, 0.07, 0.02], size=(side, side, 3))
    return (hed2rgb(amounts) * 255).round().astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_image_where_no_stain_is_negative(seed):
    rng = np.random.default_rng(seed)
    factors, shifts = rng.uniform(0.7, 1.3, 3), rng.uniform(-0.04, 0.04, 3)
    image = stained(seed)
    amounts = rgb2hed(image)
    inside = (amounts > 1e-4).all(axis=-1)  # scikit-image sets negative amounts to zero
    assert inside.mean() > 0.9
    expected = hed2rgb(amounts * factors + shifts * UNIT) * 255
    got = stain.change_stains(image, factors, shifts)
    assert np.abs(got[inside] - expected[inside]).max() <= 0.51


def test_equals_the_formula_for_any_colour_and_stays_in_range():
    image = np.random.default_rng(1).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    factors = np.array([1.4, 0.6, 1.2])
    density = -np.log10(image / 255.0)
    expected = 255 * 10 ** -(density @ hed_from_rgb @ np.diag(factors) @ rgb_from_hed)
    got = stain.change_stains(image, factors, np.zeros(3))
    assert np.abs(got - np.minimum(expected, 255)).max() <= 0.51
    assert stain.change_stains(np.zeros((4, 4, 3), np.uint8), [1, 1, 1], [0, 0, 0]).max() <= 1
    assert stain.change_stains(np.full((4, 4, 3), 255, np.uint8), [1, 1, 1], [-0.2, -0.2, -0.2]).min() == 255


def test_unit_factors_without_shift_change_nothing():
    image = np.random.default_rng(2).integers(1, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(stain.change_stains(image, np.ones(3), np.zeros(3)), image)


def test_a_shift_of_haematoxylin_is_its_colour_on_glass():
    glass = np.full((2, 2, 3), 255, np.uint8)
    got = stain.change_stains(glass, np.ones(3), [0.3, 0, 0])[0, 0]
    np.testing.assert_allclose(-np.log10(got / 255) / 0.3, [0.651, 0.701, 0.290], atol=0.01)


def test_strength_bounds_the_change_and_zero_draws_nothing():
    image, plain = stained(3), PhotometricConfig(jitter=0, grayscale=0, blur=(0, 0, 0), solarize=0)
    seen = []
    for strength in (0.0, 0.05, 0.2):
        config = plain.model_copy(update={"stain": strength})
        shown = [
            views.photometric(image, config, np.random.default_rng(seed), views.LOCAL, 48).astype(int)
            for seed in range(20)
        ]
        assert len({view.tobytes() for view in shown}) == (20 if strength else 1)
        seen.append(np.mean([np.abs(view - image).mean() for view in shown]))
    assert seen[0] == 0 < seen[1] < seen[2]
    config = PhotometricConfig(stain=0)
    first, second = (
        views.photometric(image, c, np.random.default_rng(4), 0, 48) for c in (config, PhotometricConfig())
    )
    np.testing.assert_array_equal(first, second)


def test_parameters_are_uniform_within_the_strength(monkeypatch):
    drawn = []
    monkeypatch.setattr(stain, "change_stains", lambda image, factors, shifts: drawn.append((factors, shifts)) or image)
    rng = np.random.default_rng(0)
    for _ in range(500):
        stain.jitter_stain(stained(side=2), 0.3, rng)
    factors, shifts = np.array(drawn).transpose(1, 0, 2)
    for values, low, high in ((factors, 0.7, 1.3), (shifts, -0.06, 0.06)):
        width = high - low
        assert low <= values.min() < low + 0.02 * width and high - 0.02 * width < values.max() <= high
        np.testing.assert_allclose(values.mean(axis=0), (low + high) / 2, atol=0.06 * width)
