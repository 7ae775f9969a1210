"""Views: parents are never cropped or rescaled, children keep their pixels, colours change as asked."""

import numpy as np
import pytest

from mad.config.views import PhotometricConfig, ViewsConfig
from mad.training import views

NONE = PhotometricConfig(jitter=0, grayscale=0, blur=(0, 0, 0), solarize=0)


def image(seed=0, side=24):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def pixels(array):
    """The multiset of an image's pixels."""
    return np.sort(array.reshape(-1, 3).astype(np.int64) @ [65536, 256, 1])


def test_pair_views_hold_every_pixel_of_parent_and_children_once():
    parent, children = image(0), [image(seed) for seed in (1, 2, 3, 4)]
    for seed in range(20):
        made = views.pair_views(parent, children, NONE, np.random.default_rng(seed), ("p", "a", "b", "c", "d"))
        assert np.shape(made.teacher) == (2, 24, 24, 3)
        assert np.shape(made.student) == (4, 24, 24, 3)
        assert made.local == []
        for view in made.teacher:
            np.testing.assert_array_equal(pixels(view), pixels(parent))
        for view, child in zip(made.student, children, strict=True):
            np.testing.assert_array_equal(pixels(view), pixels(child))


def test_dihedral_reaches_all_eight_and_keeps_neighbours():
    source = image(5, 4)
    seen = {views.dihedral(source, np.random.default_rng(seed)).tobytes() for seed in range(200)}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        turned = np.rot90(source, -int(rng.integers(4)))
        turned = turned[:, ::-1] if rng.integers(2) else turned
        np.testing.assert_array_equal(views.dihedral(source, np.random.default_rng(seed)), turned)
    expected = {
        np.ascontiguousarray(np.rot90(flip, turn)).tobytes() for flip in (source, source[:, ::-1]) for turn in range(4)
    }
    assert seen == expected


def test_views_are_a_function_of_the_generator_alone():
    first, second = (
        views.pair_views(image(0), [image(1)] * 4, PhotometricConfig(), np.random.default_rng(seed), ())
        for seed in (7, 7)
    )
    np.testing.assert_array_equal(first.teacher, second.teacher)
    np.testing.assert_array_equal(first.student, second.student)
    other = views.pair_views(image(0), [image(1)] * 4, PhotometricConfig(), np.random.default_rng(8), ())
    assert not np.array_equal(first.teacher, other.teacher)
    assert not np.array_equal(first.student[0], first.student[1])  # each child is augmented on its own


def test_multicrop_counts_and_sizes():
    made = views.multicrop_views(image(side=64), ViewsConfig(), 24, PhotometricConfig(), np.random.default_rng(0), "t")
    assert np.shape(made.teacher) == (2, 64, 64, 3)
    assert made.student is None
    assert np.shape(made.local) == (8, 24, 24, 3)
    none = ViewsConfig(local_crops=0)
    assert views.multicrop_views(image(), none, 8, NONE, np.random.default_rng(0), "t").local == []


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_crops_cover_the_share_of_the_area_that_they_say(scale):
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100), np.arange(100)[:, None]
    for seed in range(100):
        cut = views.crop(ramp, scale, 100, np.random.default_rng(seed)).astype(int)
        share = np.ptp(cut[..., 0]) * np.ptp(cut[..., 1]) / 99**2
        assert scale[0] * 0.8 - 0.01 < share < scale[1] * 1.1 + 0.01


def test_colour_matrix_equals_the_steps_one_after_the_other():
    source = image(3)
    rng = np.random.default_rng(11)
    config = PhotometricConfig(jitter=0.5, jitter_share=1, grayscale=0, blur=(0, 0, 0), solarize=0)
    matrix = views.colour_matrix(source, config, np.random.default_rng(11))
    rng.random()
    brightness, contrast, saturation = rng.uniform(
        1 - 0.5 * np.array([0.4, 0.4, 0.2]), 1 + 0.5 * np.array([0.4, 0.4, 0.2])
    )
    angle = 2 * np.pi * rng.uniform(-0.1, 0.1) * 0.5
    x = source.astype(np.float64) * brightness
    x = contrast * x + (1 - contrast) * (x @ views.LUMA).mean()
    x = saturation * x + (1 - saturation) * (x @ views.LUMA)[..., None]
    yiq = x @ views.RGB_TO_YIQ.T
    i, q = yiq[..., 1].copy(), yiq[..., 2].copy()
    yiq[..., 1], yiq[..., 2] = np.cos(angle) * i - np.sin(angle) * q, np.sin(angle) * i + np.cos(angle) * q
    expected = yiq @ views.YIQ_TO_RGB.T
    np.testing.assert_allclose(source @ matrix[:, :3].T + matrix[:, 3], expected, atol=1e-6)


def test_grayscale_blur_and_solarisation():
    rng = np.random.default_rng(0)
    grey = views.photometric(image(), NONE.model_copy(update={"grayscale": 1.0}), rng, views.LOCAL, 24)
    assert np.ptp(grey.astype(int), axis=-1).max() == 0
    blurred = views.photometric(
        image(side=224), NONE.model_copy(update={"blur": (1.0, 0, 0)}), np.random.default_rng(5), 0, 224
    )
    assert blurred.std() < image(side=224).std()
    solar = NONE.model_copy(update={"solarize": 1.0})
    assert views.photometric(image(), solar, rng, views.OTHER_GLOBAL, 24).max() <= 127
    np.testing.assert_array_equal(views.photometric(image(), solar, rng, views.LOCAL, 24), image())


@pytest.mark.parametrize("side", [48, 112, 224])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.7, 1.0, 1.2, 1.6, 2.0])
def test_blur_is_opencvs_up_to_rounding(side, sigma):
    source = views.cv2.GaussianBlur(image(2, side), (0, 0), 1.0)
    difference = np.abs(views.blur(source, sigma).astype(int) - views.cv2.GaussianBlur(source, (0, 0), sigma))
    assert difference.max() <= (0 if sigma <= 1 else 2)
    assert (difference > 0).mean() < 0.1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_colour_matrix_of_hue_and_grey_equals_the_matrices_multiplied(share):
    config = PhotometricConfig(jitter=1.3, jitter_share=1, grayscale=share)
    for seed in range(20):
        rng, source = np.random.default_rng(seed), image(seed)
        matrix = views.colour_matrix(source, config, np.random.default_rng(seed))
        rng.random()
        b, c, s = rng.uniform(1 - 1.3 * np.array([0.4, 0.4, 0.2]), 1 + 1.3 * np.array([0.4, 0.4, 0.2]))
        angle = 2 * np.pi * rng.uniform(-0.1, 0.1) * 1.3
        grey = np.outer(np.ones(3), views.LUMA)
        turn = [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
        tint = views.YIQ_TO_RGB @ turn @ views.RGB_TO_YIQ @ (s * np.eye(3) + (1 - s) * grey)
        last = grey if share else np.eye(3)
        offset = np.full(3, (1 - c) * b * (source.mean(axis=(0, 1)) @ views.LUMA))
        np.testing.assert_allclose(matrix, np.column_stack([last @ tint * c * b, last @ tint @ offset]), atol=1e-11)


def test_blur_scales_with_the_tile_whatever_the_size_of_the_view(monkeypatch):
    sigmas = {}
    original = views.blur

    def spy(picture, sigma):
        sigmas.setdefault(picture.shape[0], []).append(sigma)
        return original(picture, sigma)

    monkeypatch.setattr(views, "blur", spy)
    always = NONE.model_copy(update={"blur": (1.0, 1.0, 1.0)})
    rng = np.random.default_rng(0)
    for side, local_px in ((112, 48), (224, 96)):
        for _ in range(30):
            views.multicrop_views(image(side=side), ViewsConfig(), local_px, always, rng, "t")
    for side in (56, 28):
        for _ in range(30):
            views.pair_views(image(side=side), [image(side=side)] * 4, always, rng, ())
    for view, tile in ((224, 224), (96, 224), (112, 112), (48, 112), (56, 56), (28, 28)):  # globals, locals, pairs
        assert min(sigmas[view]) == pytest.approx(0.1 * tile / 224, abs=0.1 * tile / 224)
        assert max(sigmas[view]) == pytest.approx(2.0 * tile / 224, abs=0.15 * tile / 224)


def test_normalise_uses_the_models_own_mean_and_std():
    import torch

    source = image(1, 8)
    made = views.normalise(torch.from_numpy(source[None]), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    expected = (source / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(made[0].numpy(), expected.transpose(2, 0, 1), atol=1e-6)
    assert made.is_contiguous()
