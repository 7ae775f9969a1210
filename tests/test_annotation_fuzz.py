"""Mutated annotation files: whatever is in them, they are read, or refused by a MadError that names the file.

MAD_FUZZ=10000 pytest tests/test_annotation_fuzz.py -s        # so many files of each format, and their outcomes
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mad.config.model import LabelConfig
from mad.files import MadError, to_json
from mad.tiles.annotated import annotated_raster
from mad.tiles.labels import NO_CLASS, raster_shape
from mad.tiles.pyramid import Grid, Ladder

NUM_FILES = int(os.environ.get("MAD_FUZZ", "300"))
SIZE = (640, 480)
GRID = Grid(Ladder((10.0, 40.0)), 32.0, *SIZE)
LABEL = LabelConfig(classes=["A", "B"], background=None, mask_values={1: "A", 2: "B"})

HOLED = [[[10, 10], [300, 10], [300, 200], [10, 200], [10, 10]], [[50, 50], [90, 50], [90, 90], [50, 90], [50, 50]]]
CROSSED = [[[300, 300], [500, 470], [500, 300], [300, 470], [300, 300]]]
GEOJSON = {
    "type": "FeatureCollection",
    "features": [
        {
            "type": "Feature",
            "geometry": {"type": kind, "coordinates": coordinates},
            "properties": {"objectType": "annotation", "classification": classification},
        }
        for kind, coordinates, classification in [
            ("Polygon", HOLED, {"name": "A", "color": [1, 2, 3]}),
            ("MultiPolygon", [CROSSED, HOLED], {"names": ["A", "B"]}),
            ("Polygon", CROSSED, "B"),
            ("LineString", HOLED[0], {"name": "C"}),
        ]
    ],
}
SQUARE = '<{0} X="10" Y="10"/><{0} X="300.5" Y="10"/><{0} X="300" Y="2e2"/><{0} X="10" Y="200"/>'
REGIONS = (
    f'<Region Type="0" NegativeROA="0"><Vertices>{SQUARE}</Vertices></Region>'
    '<Region Type="2" NegativeROA="1"><Vertices><{0} X="20" Y="20"/><{0} X="90" Y="80"/></Vertices></Region>'
    '<Region Type="1" Text="B"><Vertices><{0} X="200" Y="200"/><{0} X="600" Y="400"/></Vertices></Region>'
)
IMAGESCOPE = (
    '<Annotations MicronsPerPixel="0.25"><Annotation Id="1" Name="A"><Regions>'
    + REGIONS.format("Vertex")
    + "</Regions>"
    '</Annotation><Annotation Id="2" Name=""><Attributes><Attribute Name="Description" Value="B"/></Attributes><Regions>'
    + REGIONS.format("Vertex")
    + "</Regions></Annotation></Annotations>"
)
HALO = '<Annotations><Annotation Name="A"><Regions>' + REGIONS.format("V") + "</Regions></Annotation></Annotations>"
ASAP = (
    "<ASAP_Annotations><Annotations>"
    + "".join(
        f'<Annotation Name="B" Type="{kind}" PartOfGroup="{group}"><Coordinates>{SQUARE.format("Coordinate")}</Coordinates>'
        "</Annotation>"
        for kind, group in [("Polygon", "A"), ("Rectangle", "None"), ("Dot", "A")]
    )
    + '</Annotations><AnnotationGroups><Group Name="A"/></AnnotationGroups></ASAP_Annotations>'
)
JUNK = [
    None,
    True,
    -1,
    0,
    10**400,
    1e9,
    1e300,
    -1.7e308,
    float("nan"),
    float("inf"),
    5e-324,
    "",
    "A",
    "\ud800",
    "7",
    "💥",
]
JUNK += [[], {}, [[]], [[[]]], [[1, 2]], [[[0, 0], [1, 1]]], [[[[9, 9], [9, 9], [9, 9]]]], {"type": "Polygon"}]
JUNK += ["Polygon", "Point", "GeometryCollection", {"name": {}}, {"names": []}, {"names": "AB"}, [1, 2, 3, 4]]
TEXTS = [
    "",
    " ",
    "A",
    "NaN",
    "-inf",
    "1e300",
    "-1e308",
    "1e9",
    "1_0",
    "0x1p3",
    "9" * 400,
    "ten",
    "1,5",
    "True",
    "2",
    "Ruler",
]

Draw = Callable[[st.SearchStrategy], int]


def pick(draw: Draw, values: list) -> object:
    return values[draw(st.integers(0, len(values) - 1))]


def mutated_json(draw: Draw) -> bytes:
    """The GeoJSON with nodes deleted, doubled, replaced or nested very deeply."""
    content = {"root": copy.deepcopy(GEOJSON)}
    for _ in range(draw(st.integers(0, 3))):
        nodes: list[tuple[dict | list, str | int]] = []
        stack: list[dict | list] = [content]
        while stack:
            node = stack.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node))
            nodes += [(node, key) for key in keys]
            stack += [node[key] for key in keys if isinstance(node[key], dict | list)]  # type: ignore[index]
        node, key = pick(draw, nodes)  # type: ignore[misc]
        deed = pick(draw, ["delete", "double", "replace", "replace", "scale"])
        if deed == "delete" and node is not content:
            del node[key]
        elif deed == "double" and isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        elif deed == "scale" and isinstance(node[key], int | float):
            node[key] *= pick(draw, [-1, 1e-300, 1000, 1e7])
        elif deed == "replace":
            node[key] = copy.deepcopy(pick(draw, JUNK))
    text = json.dumps(content["root"])
    if draw(st.integers(0, 30)) == 0:
        depth = pick(draw, [50, 1000, 100_000])
        text = text.replace("[", "[" * depth, 1)  # type: ignore[operator]
    return text.encode()


def mutated_xml(draw: Draw, text: str) -> bytes:
    """The XML with elements deleted, doubled, moved or renamed and attributes deleted or replaced."""
    root = ElementTree.fromstring(text)
    for _ in range(draw(st.integers(0, 3))):
        parents = [element for element in root.iter() if len(element)]
        attributed = [element for element in root.iter() if element.attrib]
        deed = pick(draw, ["delete", "double", "move", "rename", "attribute", "attribute", "drop"])
        if deed in ("attribute", "drop") and attributed:
            element = pick(draw, attributed)
            key = pick(draw, list(element.attrib))  # type: ignore[attr-defined]
            element.attrib.pop(key)  # type: ignore[attr-defined]
            if deed == "attribute":
                element.set(key, pick(draw, TEXTS))  # type: ignore[attr-defined]
        elif parents:
            parent = pick(draw, parents)
            child = pick(draw, list(parent))  # type: ignore[call-overload]
            if deed == "double":
                parent.append(copy.deepcopy(child))  # type: ignore[attr-defined]
            elif deed == "rename":
                child.tag = pick(draw, [element.tag for element in root.iter()])  # type: ignore[attr-defined]
            else:
                parent.remove(child)  # type: ignore[attr-defined]
                if deed == "move":
                    root.append(child)  # type: ignore[arg-type]
    return ElementTree.tostring(root, pick(draw, ["us-ascii", "utf-8", "utf-16"]))  # type: ignore[arg-type, return-value]


def damaged(draw: Draw, data: bytes) -> bytes:
    """Bytes flipped, left out or put in, or the file cut short."""
    for _ in range(draw(st.integers(0, 4))):
        # near the start lie the headers: half of the damage goes there
        place = draw(st.integers(0, len(data))) if draw(st.booleans()) else draw(st.integers(0, min(300, len(data))))
        deed = pick(draw, ["flip", "flip", "flip", "cut", "insert", "remove"])
        if deed == "flip" and place < len(data):
            data = data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
        elif deed == "cut":
            data = data[:place]
        elif deed == "insert":
            data = data[:place] + draw(st.binary(max_size=4)) + data[place:]
        elif deed == "remove":
            data = data[:place] + data[place + draw(st.integers(1, 40)) :]
    return data


def mask_bytes() -> dict[str, list[bytes]]:
    """Valid masks by suffix."""
    values = np.random.default_rng(0).integers(0, 4, (12, 16)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
    palette = Image.fromarray(values, mode="P")
    palette.putpalette([5] * 768)
    found: dict[str, list[bytes]] = {".png": [], ".tif": []}
    for image in (Image.fromarray(values), palette, Image.fromarray(values.astype(np.uint16))):
        image.save(file := io.BytesIO(), "png")
        found[".png"].append(file.getvalue())
    for options in ({"tile": (64, 64), "compression": "lzw"}, {"compression": "deflate", "rowsperstrip": 9}, {}):
        tifffile.imwrite(file := io.BytesIO(), values, **options)
        found[".tif"].append(file.getvalue())
    return found


MASKS = mask_bytes()


def mutated_png(draw: Draw) -> bytes:
    """A PNG with chunks deleted, doubled, swapped or damaged, each with the right checksum."""
    data: bytes = pick(draw, MASKS[".png"])  # type: ignore[assignment]
    chunks, place = [], 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append(data[place + 4 : place + 8 + length])
        place += 12 + length
    for _ in range(draw(st.integers(0, 2))):
        number = draw(st.integers(0, len(chunks) - 1))
        deed = pick(draw, ["delete", "double", "swap", "damage", "damage"])
        if deed == "delete" and len(chunks) > 1:
            del chunks[number]
        elif deed == "double":
            chunks.insert(draw(st.integers(0, len(chunks))), chunks[number])
        elif deed == "swap":
            chunks[0], chunks[number] = chunks[number], chunks[0]
        elif deed == "damage":
            chunks[number] = damaged(draw, chunks[number])
    parts = [struct.pack(">I", max(0, len(c) - 4)) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return data[:8] + b"".join(parts)


FORMATS: dict[str, Callable[[Draw], bytes]] = {
    ".geojson": mutated_json,
    ".xml": lambda draw: mutated_xml(draw, IMAGESCOPE),
    ".annotations": lambda draw: mutated_xml(draw, HALO),
    ".asap.xml": lambda draw: mutated_xml(draw, ASAP),
    ".png": mutated_png,
    ".tif": lambda draw: pick(draw, MASKS[".tif"]),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_file_is_read_or_refused_by_name(suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, outcomes = tmp_path_factory.mktemp("fuzz"), Counter[str]()
    is_mask = suffix in (".png", ".tif")

    @settings(max_examples=NUM_FILES, suppress_health_check=list(HealthCheck), database=None)
    @given(st.data())
    def check(choices: st.DataObject) -> None:
        draw: Draw = choices.draw
        data = FORMATS[suffix](draw)
        packed = not is_mask and draw(st.integers(0, 3)) == 0
        if packed:
            data = gzip.compress(data, 1)
        if draw(st.integers(0, 3)) == 0 or suffix == ".tif":
            data = damaged(draw, data)
        path = folder / f"a{suffix}{'.gz' if packed else ''}"
        path.write_bytes(data)
        try:
            raster, facts, warnings = annotated_raster(path, LABEL, GRID, 8, bounds=(16, 16, 600, 400), size=SIZE)
        except MadError as error:
            assert str(path) in str(error) and ";" in str(error)
            str(error).encode()
            outcomes["refused"] += 1
        else:
            assert raster.shape == raster_shape(GRID, 8) and set(np.unique(raster)) <= {0, 1, NO_CLASS}
            to_json([facts, warnings]).encode()
            outcomes["read"] += 1

    start = time.perf_counter()
    check()
    print(f"\n{suffix}: {dict(outcomes)} in {time.perf_counter() - start:.1f} s")
    assert min(outcomes["read"], outcomes["refused"]) > 0.05 * outcomes.total()
