"""What an OME-TIFF's XML tells of its image: planes, channels, and the physical size of a pixel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

SIZES = ("PhysicalSizeX", "PhysicalSizeXUnit", "PhysicalSizeY", "PhysicalSizeYUnit")


@dataclass(frozen=True)
class OmePixels:
    """The `Pixels` element of one image: its size along each further axis, and `ome.PhysicalSize…` as they are written."""

    size_z: int
    size_c: int
    size_t: int
    properties: dict[str, str]


def is_ome(description: str) -> bool:
    """Whether a TIFF's ImageDescription is OME-XML."""
    return description.rstrip("\x00\n ").endswith("</OME>")


def read_ome(xml: str, width: int, height: int) -> OmePixels | None:
    """The image of `width` x `height` px in OME-XML; None where there is no such image.

    A file may hold others, a label or a macro picture. Schema: OME-XML 2016-06, `Pixels`.

    Raises:
        ValueError: the XML is damaged or unsafe.
    """
    try:
        found = _pixels(fromstring(xml.rstrip("\x00")).iter(), width, height)
        if found is None:
            return None
        size_z, size_c, size_t = (int(found.get(f"Size{axis}", 1)) for axis in "ZCT")
    except (ParseError, DefusedXmlException, ValueError) as error:
        raise ValueError(f"damaged OME-XML: {error}") from None
    return OmePixels(
        size_z, size_c, size_t, {f"ome.{name}": found.attrib[name] for name in SIZES if name in found.attrib}
    )


def _pixels(elements: Iterable[Element], width: int, height: int) -> Element | None:
    for element in elements:
        if element.tag.rpartition("}")[2] == "Pixels" and (element.get("SizeX"), element.get("SizeY")) == (
            str(width),
            str(height),
        ):
            return element
    return None
