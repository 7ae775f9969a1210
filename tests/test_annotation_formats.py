"""ImageScope, HALO and ASAP files in the layouts that these programs write, and how a file's format is told."""

import gzip
import json
import math
from pathlib import Path

import pytest
import shapely

from mad.files import MadError
from mad.slides.annotations import Annotation, Region, read_annotation, region

IMAGESCOPE = """<Annotations MicronsPerPixel="0.252100">
  <Annotation Id="1" Name="{name}" ReadOnly="0" NameReadOnly="0" LineColorReadOnly="0" Incremental="0" Type="4"
              LineColor="65280" Visible="1" Selected="1" MarkupImagePath="" MacroName="">
    <Attributes>
      <Attribute Name="Description" Id="0" Value="{description}"/>
    </Attributes>
    <Regions>
      <RegionAttributeHeaders>
        <AttributeHeader Id="9999" Name="Region" ColumnWidth="-1"/>
        <AttributeHeader Id="1" Name="Description" ColumnWidth="-1"/>
      </RegionAttributeHeaders>
{regions}
    </Regions>
    <Plots/>
  </Annotation>
</Annotations>
"""
REGION = """      <Region Id="1" Type="{kind}" Zoom="0.042148" Selected="0" ImageLocation="" ImageFocus="-1" Length="74565.8"
              Area="213363186.2" LengthMicrons="18798.0" AreaMicrons="13560170.4" Text="{text}" NegativeROA="{negative}"
              InputRegionId="0" Analyze="1" DisplayId="1">
        <Attributes><Attribute Name="Description" Id="0" Value="of the region"/></Attributes>
        <Vertices>
{vertices}
        </Vertices>
      </Region>"""
HALO = """<Annotations>
  <Annotation Name="Gray Matter" Visible="True" LineColor="5634047">
    <Regions>
      <Region Type="Rectangle" HasEndcaps="0" NegativeROA="0">
        <Vertices>
          <V X="100" Y="400" />
          <V X="500" Y="200" />
        </Vertices>
        <Comments>
          <Comment Author="&lt;no user&gt;" Body="a square" CreatedTime="2024-03-20T17:02:03Z" />
        </Comments>
      </Region>
      <Region Type="Ellipse" HasEndcaps="0" NegativeROA="1">
        <Vertices>
          <V X="200" Y="250" />
          <V X="300" Y="350" />
        </Vertices>
      </Region>
      <Region Type="Ruler" HasEndcaps="0" NegativeROA="0">
        <Vertices>
          <V X="0" Y="0" />
          <V X="50" Y="50" />
        </Vertices>
      </Region>
      <Region Type="Pin" HasEndcaps="0" NegativeROA="0"><Vertices><V X="7" Y="7" /></Vertices></Region>
    </Regions>
  </Annotation>
  <Annotation Name="White Matter" Visible="True" LineColor="13952807">
    <Regions>
      <Region Type="Polygon" HasEndcaps="0" NegativeROA="0">
        <Vertices>
          <V X="-10" Y="200" />
          <V X="90" Y="200" />
          <V X="90" Y="300" />
          <V X="-10" Y="300" />
          <V X="-10" Y="200" />
        </Vertices>
      </Region>
    </Regions>
  </Annotation>
</Annotations>"""
ASAP = """<?xml version="1.0"?>
<ASAP_Annotations>
	<Annotations>
		<Annotation Name="Annotation 0" Type="Polygon" PartOfGroup="metastases" Color="#F4FA58">
			<Coordinates>
				<Coordinate Order="2" X="110.5" Y="110" />
				<Coordinate Order="0" X="10.5" Y="10" />
				<Coordinate Order="3" X="10.5" Y="110" />
				<Coordinate Order="1" X="110.5" Y="10" />
			</Coordinates>
		</Annotation>
		<Annotation Name="Stroma" Type="Rectangle" PartOfGroup="None" Color="#F4FA58">
			<Coordinates>
				<Coordinate Order="0" X="0" Y="0" />
				<Coordinate Order="1" X="0" Y="20" />
				<Coordinate Order="2" X="30" Y="20" />
				<Coordinate Order="3" X="30" Y="0" />
			</Coordinates>
		</Annotation>
		<Annotation Name="Annotation 2" Type="Dot" PartOfGroup="metastases" Color="#F4FA58">
			<Coordinates><Coordinate Order="0" X="5" Y="5" /></Coordinates>
		</Annotation>
		<Annotation Name="Annotation 3" Type="PointSet" PartOfGroup="metastases" Color="#F4FA58">
			<Coordinates>
				<Coordinate Order="0" X="0" Y="0" />
				<Coordinate Order="1" X="0" Y="9" />
				<Coordinate Order="2" X="9" Y="9" />
			</Coordinates>
		</Annotation>
		<Annotation Name="Annotation 4" Type="Spline" PartOfGroup="normal" Color="#F4FA58">
			<Coordinates>
				<Coordinate Order="0" X="0" Y="0" />
				<Coordinate Order="1" X="40" Y="0" />
				<Coordinate Order="2" X="0" Y="40" />
			</Coordinates>
		</Annotation>
	</Annotations>
	<AnnotationGroups>
		<Group Name="metastases" PartOfGroup="None" Color="#ff0000"><Attributes /></Group>
		<Group Name="normal" PartOfGroup="None" Color="#ff00ff"><Attributes /></Group>
	</AnnotationGroups>
</ASAP_Annotations>
"""
BOMB = """<?xml version="1.0"?>
<!DOCTYPE Annotations [
 <!ENTITY lol "lol"><!ENTITY lol2 "&lol;&lol;&lol;&lol;&lol;&lol;&lol;&lol;"><!ENTITY lol3 "&lol2;&lol2;&lol2;&lol2;&lol2;">
]>
<Annotations><Annotation Name="&lol3;"/></Annotations>
"""
EXTERNAL = '<!DOCTYPE Annotations [<!ENTITY x SYSTEM "file:///etc/hostname">]><Annotations><Annotation>&x;</Annotation></Annotations>'


def outline(*points: tuple[float, float], kind: str = "0", text: str = "", negative: int = 0) -> str:
    vertices = "\n".join(f'          <Vertex X="{x:f}" Y="{y:f}" Z="0"/>' for x, y in points)
    return REGION.format(kind=kind, text=text, negative=negative, vertices=vertices)


def square(x: float, y: float, side: float, **options: object) -> str:
    return outline((x, y), (x + side, y), (x + side, y + side), (x, y + side), **options)  # type: ignore[arg-type]


def imagescope(folder: Path, *regions: str, name: str = "Tumor", description: str = "") -> list[Region]:
    path = folder / "slide.xml"
    path.write_text(IMAGESCOPE.format(name=name, description=description, regions="\n".join(regions)))
    return read_annotation(path).regions


def test_imagescope_negative_regions_cut_holes_whatever_their_order(tmp_path: Path) -> None:
    first, second, third = imagescope(
        tmp_path,
        square(0, 0, 100),
        square(80, 20, 40, negative=1),  # across both
        square(100, 0, 100),
        square(10, 10, 10, negative=1),
        square(15, 10, 10, negative=1),  # overlaps the one before
        square(1000, 0, 50),
    )
    assert first.name == second.name == third.name == "Tumor"
    assert first.geometry.area == pytest.approx(100 * 100 - 20 * 40 - 15 * 10)
    assert second.geometry.area == pytest.approx(100 * 100 - 20 * 40)
    assert third.geometry.area == 50 * 50
    assert not first.geometry.contains(shapely.Point(17, 15))


def test_imagescope_counts_what_it_mends_and_leaves_out(tmp_path: Path) -> None:
    imagescope(
        tmp_path,
        square(0, 0, 100, text="A"),
        square(300, 0, 10, text="A"),
        square(290, -10, 50, negative=1),  # swallows the one before
        square(0, 200, 10),  # without a class
        outline((0, 0), (100, 100), (100, 0), (0, 100), text="B"),
        outline((0, 0), (9, 9), kind="3"),
        outline((5, 5), kind="5", text="A"),
        name="",
    )
    found = read_annotation(tmp_path / "slide.xml")
    assert [(region.name, region.geometry.area) for region in found.regions] == [("A", 10_000), ("B", 5000)]
    assert (found.num_repaired, found.num_unnamed, found.num_without_area) == (1, 1, 3)


def test_negative_regions_cut_their_own_layer_only_and_may_swallow_a_region(tmp_path: Path) -> None:
    one = IMAGESCOPE.format(
        name="A", description="", regions=square(0, 0, 10) + square(30, 0, 10) + square(-5, -5, 20, negative=1)
    )
    other = IMAGESCOPE.format(name="B", description="", regions=square(0, 0, 10))
    body = other.partition(">")[2].removesuffix("</Annotations>\n")
    path = tmp_path / "slide.xml"
    path.write_text(one.replace("</Annotations>", body + "</Annotations>"))
    assert [(r.name, r.geometry.bounds) for r in read_annotation(path).regions] == [
        ("A", (30, 0, 40, 10)),
        ("B", (0, 0, 10, 10)),
    ]


@pytest.mark.parametrize(
    ("name", "description", "expected"),
    [("Tumor", "Stroma", "Tumor"), (" ", "Stroma", "Stroma"), ("", "", "necrosis")],
)
def test_imagescope_class_is_name_then_description_then_text(
    tmp_path: Path, name: str, description: str, expected: str
) -> None:
    regions = [square(0, 0, 10, text="necrosis"), square(5, 5, 2, negative=1)]
    (found,) = imagescope(tmp_path, *regions, name=name, description=description)
    assert found.name == expected
    assert found.geometry.area == 96  # the hole needs no class of its own


def test_imagescope_outlines_without_a_class_are_left_out(tmp_path: Path) -> None:
    assert imagescope(tmp_path, square(0, 0, 10), name="") == []


def test_imagescope_shapes(tmp_path: Path) -> None:
    box, corners, tilted, ellipse, crossed = imagescope(
        tmp_path,
        outline((10, 20), (110, 70), kind="1"),
        outline((10, 20), (110, 20), (110, 70), (10, 70), kind="1"),
        outline((0, 50), (50, 0), (100, 50), (50, 100), kind="1"),
        outline((400, 100), (200, 200), kind="2"),
        outline((0, 0), (100, 100), (100, 0), (0, 100)),
        outline((0, 0), (9, 9), kind="3"),  # an arrow
        outline((0, 0), (9, 9)),
        outline((5, 5), kind="5"),
        outline(),
        outline((0, 0), (9, 9), (0, 0)),
    )
    assert box.geometry.equals(corners.geometry) and box.geometry.area == 100 * 50
    assert tilted.geometry.area == 5000
    assert ellipse.geometry.area == pytest.approx(math.pi * 100 * 50, rel=0.01)
    assert ellipse.geometry.bounds == pytest.approx((200, 100, 400, 200), abs=0.1)
    assert crossed.geometry.is_valid and crossed.geometry.area == 5000


@pytest.mark.parametrize("form", ["namespace", "utf-16", "utf-8 with mark", "gzip"])
def test_encodings_and_namespaces(tmp_path: Path, form: str) -> None:
    text = IMAGESCOPE.format(name="Größe", description="", regions=square(0, 0, 10))
    if form == "namespace":
        text = text.replace("<Annotations ", '<Annotations xmlns="http://www.aperio.com/annotations" ')
    path = tmp_path / ("slide.XML.gz" if form == "gzip" else "slide.XML")
    encoding = {"utf-16": "utf-16", "utf-8 with mark": "utf-8-sig"}.get(form, "utf-8")
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if form == "gzip" else data)
    (found,) = read_annotation(path).regions
    assert found.name == "Größe" and found.geometry.area == 100


def test_halo(tmp_path: Path) -> None:
    path = tmp_path / "slide.annotations"
    path.write_text(HALO)
    gray, white = read_annotation(path).regions
    assert (gray.name, white.name) == ("Gray Matter", "White Matter")
    assert gray.geometry.area == pytest.approx(400 * 200 - math.pi * 50**2, rel=0.01)
    assert 80_000 - gray.geometry.area == pytest.approx(math.pi * 50**2, rel=0.01)
    assert not gray.geometry.contains(shapely.Point(250, 300))
    assert white.geometry.bounds == (-10, 200, 90, 300) and white.geometry.area == 10_000


def test_asap(tmp_path: Path) -> None:
    path = tmp_path / "slide.xml"
    path.write_text(ASAP)
    regions = read_annotation(path).regions
    assert [region.name for region in regions] == ["metastases", "Stroma", "normal"]
    assert [region.geometry.area for region in regions] == [
        10_000,
        600,
        800,
    ]  # the first one's vertices lie out of order
    assert regions[0].geometry.bounds == (10.5, 10, 110.5, 110)


def test_only_qupath_starts_at_the_bounds(tmp_path: Path) -> None:
    frame = {"bounds": (1000, 2000, 500, 400), "size": (5000, 6000)}
    ring = [[0, 0], [10, 0], [10, 10], [0, 0]]
    feature = {"geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {"classification": "A"}}
    for name, text, corner in [
        ("a.geojson", json.dumps(feature), (1000, 2000)),
        ("a.json", json.dumps([feature]), (1000, 2000)),
        ("a.xml", IMAGESCOPE.format(name="A", description="", regions=square(0, 0, 10)), (0, 0)),
        ("b.xml", ASAP, (10.5, 10)),
        ("a.annotations", HALO, (100, 200)),
    ]:
        (tmp_path / name).write_text(text)
        assert read_annotation(tmp_path / name, **frame).regions[0].geometry.bounds[:2] == corner  # type: ignore[arg-type]
    assert read_annotation(tmp_path / "a.geojson").regions[0].geometry.bounds[:2] == (0, 0)


@pytest.mark.parametrize("name", ["slide.ndpa", "slide.gz", "slide", "slide.xml.zip"])
def test_unknown_formats_are_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(MadError, match=rf"{name}: no known annotation format.*\.geojson.*\.xml.*\.annotations"):
        read_annotation(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "the file is empty"),
        ("{}", "not well-formed"),
        (ASAP[:900], "unclosed token"),
        ("<annotation><folder/></annotation>", "<annotation> where <Annotations> or <ASAP_Annotations> should be"),
        (HALO.replace('X="90"', 'X="ninety"'), "ninety"),
        (HALO.replace('X="90"', 'X="nan"'), "not finite"),
        (HALO.replace('X="90"', 'X="1e300"'), "beyond 1e[+]09 px"),
        ("<Annotations>" + "<Annotation>" * 100_000, "no element found|unclosed"),
        (HALO.replace('X="90"', 'x="90"'), "a V without 'X'"),
        ('<?xml version="1.0" encoding="klingon"?><Annotations/>', "klingon|unknown encoding"),
    ],
)
def test_broken_xml_is_refused_by_name(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "slide.xml"
    path.write_text(text)
    with pytest.raises(MadError, match=rf"slide.xml: no ImageScope, HALO or ASAP annotation \(.*({cause})"):
        read_annotation(path)


@pytest.mark.parametrize("text", [BOMB, EXTERNAL], ids=["billion laughs", "external entity"])
def test_entities_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "slide.annotations"
    path.write_text(text)
    with pytest.raises(MadError, match="slide.annotations: unsafe XML.*remove the declaration"):
        read_annotation(path)


@pytest.mark.parametrize("name", ["slide.xml", "slide.xml.gz", "slide.geojson", "slide.geojson.gz"])
def test_size_counts_after_decompression(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"<Annotations>{' ' * 5000}</Annotations>" if "xml" in name else f"[{' ' * 5000}]"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_annotation(path) == Annotation([])
    monkeypatch.setattr(region, "MAX_BYTES", 5000)
    with pytest.raises(MadError, match=f"{name}: no .*more than 5e-06 GB"):
        read_annotation(path)


def test_missing_file_and_damaged_gzip(tmp_path: Path) -> None:
    with pytest.raises(MadError, match="leave the cell empty"):
        read_annotation(tmp_path / "none.xml")
    path = tmp_path / "slide.annotations.gz"
    path.write_bytes(gzip.compress(HALO.encode())[:-12])
    with pytest.raises(MadError, match="no ImageScope, HALO or ASAP annotation"):
        read_annotation(path)
