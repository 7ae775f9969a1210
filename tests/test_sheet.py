"""The cohort sheet: what it accepts, and that each fault is told with its mend."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mad.files import MadError
from mad.slides.sheet import draw_split, read_sheet, write_sheet

FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}


def read(path: Path, rows: list[dict[str, str]], split_by: str = "patient"):  # type: ignore[no-untyped-def]
    write_sheet(path / "slides.tsv", rows)
    return read_sheet(path / "slides.tsv", split_by=split_by, fractions=FRACTIONS, seed=0)


def rows(count: int, **more: str) -> list[dict[str, str]]:
    return [{"slide_id": f"S{n}", "path": f"s{n}.svs", "patient_id": f"P{n}", **more} for n in range(count)]


def test_a_sheet_reads(tmp_path: Path) -> None:
    first, *_ = read(tmp_path, rows(30, mpp="0.25", annotation="a.geojson", grade="2"))
    assert first.path == str(tmp_path / "s0.svs") and first.annotation == str(tmp_path / "a.geojson")
    assert first.mpp == 0.25 and first.targets == {"grade": "2"}
    assert first.tiling() == {"slide_id": "S0", "path": first.path, "annotation": first.annotation, "mpp": 0.25}
    assert {row.split for row in read(tmp_path, rows(30))} == {"train", "val", "test"}
    assert {row.split for row in read(tmp_path, rows(2), "block")} == {None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slide_id": "a.b"}, r"slide_id 'a.b' may hold only .* \(try 'a-b'\)"),
        ({"slide_id": "../x"}, r"try 'x'"),
        ({"slide_id": "S1"}, "occurs 2 times"),
        ({"patient_id": ""}, "line 2: patient_id is empty"),
        ({"mpp": "40x"}, "mpp '40x' is no number"),
        ({"mpp": "400"}, "outside 0.02..20"),
        ({"split": "trian"}, "did you mean 'train'"),
        ({"split": "test"}, "some slides have a split and some have none"),
    ],
)
def test_faults_are_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    records = rows(3, split="", mpp="")
    records[0].update(change)
    with pytest.raises(MadError, match=message):
        read(tmp_path, records)


def test_braces_which_a_workflow_would_fill_in_are_refused_by_name(tmp_path: Path) -> None:
    """In a cell, or in the folder that it starts at."""
    with pytest.raises(MadError, match=r"line 3: path '.*/\{slide\}.svs' holds a brace"):
        read(tmp_path, [*rows(1), {"slide_id": "S9", "path": "{slide}.svs", "patient_id": "P9"}], "block")
    with pytest.raises(MadError, match=r"line 2: annotation '.*/a\}.geojson' holds a brace"):
        read(tmp_path, rows(1, annotation="a}.geojson"), "block")
    (tmp_path / "{batch}").mkdir()
    with pytest.raises(MadError, match=r"line 2: path .*/\{batch\}/s0.svs' holds a brace"):
        read(tmp_path / "{batch}", rows(1), "block")


def test_no_patient_is_on_two_sides(tmp_path: Path) -> None:
    records = rows(3, split="train")
    records[2] |= {"patient_id": "P0", "split": "test"}
    with pytest.raises(MadError, match=r"patient 'P0' is on two sides: \['test', 'train'\]"):
        read(tmp_path, records)
    with pytest.raises(MadError, match="leave the split"):
        read(tmp_path, rows(2))


HEAD = "slide_id\tpath\tpatient_id"


def read_bytes(folder: Path, content: bytes | str):  # type: ignore[no-untyped-def]
    path = folder / "slides.tsv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_sheet(path, split_by="block", fractions=FRACTIONS, seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; its first line names the columns"),
        ("\n\t\t\n", "is empty"),
        (HEAD + "\n", "holds no slide; give each a line of its own below"),
        ("slide_id\tpath\nS1\ta.svs\n", r"lacks the column\(s\) \['patient_id'\]; it has \['slide_id', 'path'\]"),
        ("slide_id,path,patient_id\nS1,a.svs,P1\n", "is separated by ',', not by tabs"),
        ("slide_id;path;patient_id\nS1;a.svs;P1\n", "is separated by ';', not by tabs"),
        ("slide_id path patient_id\nS1 a.svs P1\n", "are they separated by tabs"),
        (f"{HEAD}\nS1\tMüller.svs\tP1\n".encode("latin-1"), "line 2 is not UTF-8 .byte 0xfc; Latin-1 perhaps"),
        (f"{HEAD}\nS1\ta.svs\tP1\n".encode("utf-16"), "is UTF-16"),
        ("Slide_ID\tpath\tPatient ID\nS1\ta.svs\tP1\n", "column 'Patient ID' is to be written 'patient_id'"),
        (f"{HEAD}\tMPP\nS1\ta.svs\tP1\t0.25\n", "line 1: column 'MPP' is to be written 'mpp'"),
        (f"{HEAD}\tpath\nS1\ta.svs\tP1\tb.svs\n", "column 'path' occurs twice"),
        (f"{HEAD}\nS1\ta.svs\tP1\tmore\n", "line 2: has a cell under no column"),
        (f'{HEAD}\nS1\t"a.svs\tP1\nS2\tb.svs\tP2\n', "is a quotation mark left open"),
        (f"{HEAD}\nS1\ta.svs\tP1\n\nS 2\tb.svs\tP2\n", r"line 4: slide_id 'S 2' may hold only .*try 'S-2'"),
        (f"{HEAD}\nHirn_ü\ta.svs\tP1\n", "slide_id 'Hirn_ü' may hold only .*try 'Hirn'"),
        (f"{HEAD}\n\ta.svs\tP1\n", "line 2: slide_id is empty"),
        (f"{HEAD}\nS1\ta.svs\tP1\ns1\tb.svs\tP1\n", r"\['S1', 's1'\] differ in case alone"),
        (f"{HEAD}\nS1\ta.svs\tP1\nS2\tx/../a.svs\tP1\n", r"slides \['S1', 'S2'\] are one file \(.*/a.svs\); keep one"),
        (f"{HEAD}\nS1\ta.svs\tP1\nS2\t./a.svs\tP2\n", r"are one file .* of the patients \['P1', 'P2'\]"),
    ],
)
def test_faults_of_form_are_named(tmp_path: Path, content: bytes | str, message: str) -> None:
    with pytest.raises(MadError, match=message):
        read_bytes(tmp_path, content)


def test_what_spreadsheets_leave_behind_is_no_fault(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, trailing empty columns and rows, short rows, quoted cells, spaces around cells."""
    text = f'\ufeff{HEAD}\tgrade\t\t\r\nS1\t"a.svs"\t P1 \t2\t\t\r\n\t\t\t\t\t\r\nS2\tb.svs\tP2\r\n\t\t\r\n'
    one, two = read_bytes(tmp_path, text)
    assert (one.slide_id, one.path, one.patient_id) == ("S1", str(tmp_path / "a.svs"), "P1")
    assert one.targets == {"grade": "2"} and two.targets == {"grade": ""}


def test_ids_decide_not_file_names(tmp_path: Path) -> None:
    """The same file name in two folders, a path that climbs out of the sheet's folder, and a link are all fine."""
    (tmp_path / "link.svs").symlink_to(tmp_path / "elsewhere.svs")
    slides = ["one/scan.svs", "two/scan.svs", "../shared/scan.svs", "link.svs"]
    found = read(
        tmp_path, [{"slide_id": f"S{n}", "path": p, "patient_id": f"P{n}"} for n, p in enumerate(slides)], "block"
    )
    assert [row.path for row in found] == [str(tmp_path / path) for path in slides]
    records = [{"slide_id": f"S{n}", "path": p, "patient_id": "P"} for n, p in enumerate(["link.svs", "elsewhere.svs"])]
    with pytest.raises(MadError, match="are one file"):
        read(tmp_path, records, "block")


def test_all_faults_of_a_long_sheet_are_told_at_once(tmp_path: Path) -> None:
    records = rows(1000, mpp="", split="")
    records[9]["slide_id"] = "a b"
    records[499]["mpp"] = "40x"
    records[999]["patient_id"] = ""
    with pytest.raises(MadError) as caught:
        read(tmp_path, records)
    head, *faults = str(caught.value).splitlines()
    assert head.endswith("slides.tsv: 3 fault(s)")
    assert [fault.strip().split(":")[0] for fault in faults] == ["line 11", "line 501", "line 1001"]


@given(st.text(min_size=1), st.integers(0, 100))
def test_a_drawn_split_depends_on_the_patient_alone(patient: str, seed: int) -> None:
    assert draw_split(patient, FRACTIONS, seed) == draw_split(patient, FRACTIONS, seed)
    assert draw_split(patient, {"train": 0.0, "val": 0.0, "test": 1.0}, seed) == "test"


def test_drawn_splits_follow_the_fractions() -> None:
    drawn = [draw_split(f"P{n}", FRACTIONS, 0) for n in range(4000)]
    for name, share in FRACTIONS.items():
        assert abs(drawn.count(name) / 4000 - share) < 0.03
