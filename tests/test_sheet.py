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


def test_no_patient_is_on_two_sides(tmp_path: Path) -> None:
    records = rows(3, split="train")
    records[2] |= {"patient_id": "P0", "split": "test"}
    with pytest.raises(MadError, match=r"patient 'P0' is on two sides: \['test', 'train'\]"):
        read(tmp_path, records)
    with pytest.raises(MadError, match="leave the split"):
        read(tmp_path, rows(2))
    with pytest.raises(MadError, match="separated by tabs"):
        (tmp_path / "slides.csv").write_text("slide_id,path,patient_id\n")
        read_sheet(tmp_path / "slides.csv", split_by="patient", fractions=FRACTIONS, seed=0)


@given(st.text(min_size=1), st.integers(0, 100))
def test_a_drawn_split_depends_on_the_patient_alone(patient: str, seed: int) -> None:
    assert draw_split(patient, FRACTIONS, seed) == draw_split(patient, FRACTIONS, seed)
    assert draw_split(patient, {"train": 0.0, "val": 0.0, "test": 1.0}, seed) == "test"


def test_drawn_splits_follow_the_fractions() -> None:
    drawn = [draw_split(f"P{n}", FRACTIONS, 0) for n in range(4000)]
    for name, share in FRACTIONS.items():
        assert abs(drawn.count(name) / 4000 - share) < 0.03
