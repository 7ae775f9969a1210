"""Colours of classes and magnifications, as the colour-blind see them."""

from itertools import combinations

import numpy as np
import pytest
from pydantic import ValidationError
from skimage.color import rgb2lab

from mad.config.model import LabelConfig
from mad.reporting.figures import COARSE, FINE
from mad.reporting.overlay import PALETTE, class_colours, rgb

# Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen(colour: str, vision: str) -> np.ndarray:
    """CIELAB of an sRGB colour."""
    value = np.array(rgb(colour)) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    back = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(rgb2lab(back[None, None])[0, 0])


def difference(one: str, other: str, vision: str) -> float:
    return float(np.linalg.norm(seen(one, vision) - seen(other, vision)))


@pytest.mark.parametrize("vision", VISION)
def test_colours_differ_to_everyone(vision: str) -> None:
    """CIE76 differences of 15 and more, 2.3 being the least that is noticed; white is what has no label in maps."""
    near = {pair: difference(*pair, vision) for pair in combinations([*PALETTE, "#ffffff"], 2)}
    assert min(near.values()) > 15, min(near, key=near.__getitem__)
    assert difference(COARSE, FINE, vision) > 50


def test_no_two_classes_share_a_colour() -> None:
    """The eleventh class has no colour of the palette left; a configured colour may be another class's default."""
    label = LabelConfig(
        classes=[f"c{n}" for n in range(255)], colours={"c0": PALETTE[1].upper(), "c200": "#123456"}, background=None
    )
    colours = class_colours(label)
    assert list(colours) == label.classes and colours["c0"] == PALETTE[1].upper() and colours["c200"] == "#123456"
    assert len({colour.lower() for colour in colours.values()}) == 255
    assert [colours[f"c{n}"] for n in range(2, 10)] == PALETTE[2:], "the others keep theirs"
    with pytest.raises(ValidationError, match=r"\['a', 'b'\] have a colour in common"):
        LabelConfig(classes=["a", "b"], colours={"a": "#ABCDEF", "b": "#abcdef"}, background=None)


def test_the_measure_knows_red_from_green_and_who_does_not() -> None:
    red, green = "#b05030", "#6b7a2e"
    assert difference(red, green, "normal") > 45 and difference(red, green, "deuteranopia") < 12
