"""`mad plan`: counts as stage `tile` finds them, disk near what the shards take, failing slides first."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import write_tiff
from pipeline import configure, run_all
from rich.console import Console

from mad.config import Config, parse_config
from mad.files import MadError, read_json, write_json
from mad.reporting.plan import member_bytes, plan, shard_bytes, share_samples
from mad.reporting.plan_table import _size, render
from mad.slides.sheet import cohort_rows, write_sheet
from mad.stages import tile
from mad.tiles.pyramid import Ladder

LADDER = Ladder((2.5, 10.0, 40.0))


@pytest.fixture(scope="module")
def config(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return configure(tmp_path_factory.mktemp("plan"), slides)


@pytest.fixture(scope="module")
def before(config: Config) -> dict[str, Any]:
    """The plan of a cohort of which nothing was made yet."""
    return plan(config)


@pytest.fixture(scope="module")
def results(config: Config, before: dict[str, Any]) -> Path:
    """What the stages then made of it."""
    return run_all(config)


def test_tiles_are_those_of_the_tile_tables(before: dict[str, Any], results: Path) -> None:
    for slide in before["slides"]:
        table = pd.read_parquet(results / "tile" / f"{slide['slide_id']}.parquet")
        for name, level in slide["magnifications"].items():
            here = table[table["magnification"] == float(name[:-1])]
            assert level["tiles"] == len(here)
            assert level["whole"] == (here["status"] != "edge").sum()
            assert level["tissue"] == pytest.approx((here["status"] == "ok").sum(), rel=0.1)


def test_disk_is_near_what_the_shards_take(before: dict[str, Any], results: Path) -> None:
    taken = sum(path.stat().st_size for path in (results / "shard").rglob("*.tar"))
    assert before["totals"]["bytes"] == pytest.approx(taken, rel=0.5)
    rows = sum(len(pd.read_parquet(results / "shard" / f"{slide}.parquet")) for slide in ("S01", "S02"))
    assert before["totals"]["cut"] == pytest.approx(rows, rel=0.5)
    assert "cut and encoded now" in before["how"]["disk"]


def test_existing_shards_tell_the_bytes_better(config: Config, results: Path) -> None:
    found = plan(config, quick=True)
    taken = sum(path.stat().st_size for path in (results / "shard").rglob("*.tar"))
    assert "of the shards that are there" in found["how"]["disk"]
    assert found["totals"]["bytes"] == pytest.approx(taken, rel=0.5)
    assert found["totals"]["tile_hours"] is None and found["totals"]["magnifications"]["10x"]["tissue"] is None


def test_a_slide_smaller_than_a_coarsest_tile_is_measured(slides: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, slides, tile={"tile_px": 224})
    found = plan(config)
    assert found["totals"]["magnifications"]["2.5x"]["whole"] == 0
    taken = sum(path.stat().st_size for path in (run_all(config) / "shard").rglob("*.tar"))
    assert found["totals"]["bytes"] == pytest.approx(taken, rel=0.5)


def test_hours_are_measured(before: dict[str, Any]) -> None:
    assert 0 < before["totals"]["tile_hours"] < 0.1 and 0 < before["totals"]["shard_hours"] < 0.1
    assert "divide by the jobs" in before["how"]["hours"]


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_edges_and_dropped_magnifications_are_counted_as_the_stage_does(tmp_path: Path, mpp: float) -> None:
    """A slide of no whole number of tiles, with one level; at .5 um/px it gives no 40x, on a grid of its own."""
    pixels = np.random.default_rng(0).integers(0, 255, (1900, 2500, 3)).astype(np.uint8)
    write_tiff(tmp_path / "s.tiff", [pixels], mpp)
    write_sheet(tmp_path / "slides.tsv", [{"slide_id": "S", "path": "s.tiff", "patient_id": "P"}])
    cohort = {"sheet": str(tmp_path / "slides.tsv"), "split_by": "block"}
    config = parse_config({"results": str(tmp_path / "results"), "cohort": cohort, "tile": {"tile_px": 100}})
    found = plan(config, quick=True)
    tile.run(config, cohort_rows(config)[0])
    table = pd.read_parquet(tmp_path / "results" / "tile" / "S.parquet")
    expected = {f"{m:g}x": n for m, n in table["magnification"].value_counts().items()}
    assert {name: level["tiles"] for name, level in found["slides"][0]["magnifications"].items()} == expected
    assert len(expected) == (3 if mpp == 0.25 else 2)
    assert (table["status"] == "edge").any()
    assert found["totals"]["bytes"] is None and found["totals"]["shard_hours"] is None


def test_slides_that_will_fail_come_first_with_their_cause(slides: Path, tmp_path: Path) -> None:
    write_tiff(tmp_path / "noscale.tiff", [np.zeros((600, 600, 3), np.uint8)], mpp=None)
    (tmp_path / "text.svs").write_text("hello")
    paths = {"A": slides / "S01.tiff", "B": "noscale.tiff", "C": "text.svs", "D": "none.svs"}
    records = [
        {"slide_id": name, "path": str(path), "patient_id": name, "split": "train"} for name, path in paths.items()
    ]
    write_sheet(tmp_path / "slides.tsv", records)
    config = parse_config({"results": str(tmp_path), "cohort": {"sheet": str(tmp_path / "slides.tsv")}})
    found = plan(config, quick=True)
    assert [slide["slide_id"] for slide in found["slides"]] == ["B", "C", "D", "A"]
    assert (found["totals"]["slides"], found["totals"]["failing"]) == (4, 3)
    for slide, cause in zip(found["slides"], ["`mpp` column", "text.svs", "no such slide"], strict=False):
        assert cause in slide["error"]
    text = printed(found)
    assert text.index("B will FAIL") < text.index("D will FAIL") < text.index("1 slides")


def annotated_slide(folder: Path, annotation: str) -> Config:
    write_tiff(folder / "s.tiff", [np.full((900, 900, 3), 200, np.uint8)], 0.25)
    record = {"slide_id": "S", "path": "s.tiff", "patient_id": "P", "annotation": annotation}
    write_sheet(folder / "slides.tsv", [record])
    cohort = {"sheet": str(folder / "slides.tsv"), "split_by": "block"}
    return parse_config({"results": str(folder / "results"), "cohort": cohort, "tile": {"tile_px": 32}})


@pytest.mark.parametrize(
    ("annotation", "content", "told_quickly"),
    [
        ("none.geojson", None, True),
        ("folder.geojson", "folder", True),
        ("damaged.geojson", '{"features": [', False),
        ("other.xml", "<Wrong/>", False),
        ("text.txt", "hello", False),
        ("mask.png", "no picture", True),
    ],
)
def test_annotations_that_will_fail_are_named_as_the_stage_names_them(
    tmp_path: Path, annotation: str, content: str | None, told_quickly: bool
) -> None:
    config = annotated_slide(tmp_path, annotation)
    if content == "folder":
        (tmp_path / annotation).mkdir()
    elif content is not None:
        (tmp_path / annotation).write_text(content)
    tile.run(config, cohort_rows(config)[0])
    cause = read_json(tmp_path / "results" / "tile" / "S.json")["cause"]
    assert annotation in cause
    assert plan(config)["slides"][0]["error"] == cause
    assert plan(config, quick=True)["slides"][0]["error"] == (cause if told_quickly else None)


def test_misspelt_classes_and_areas_off_the_slide_are_told_before_anything_is_tiled(tmp_path: Path) -> None:
    """In the words of the stage; --quick, which reads no polygons, says nothing."""
    config = annotated_slide(tmp_path, "a.geojson")
    squares = [("Gray mater", 100), ("Gray mater", 300), ("Gray Matter", 500), ("Gray Matter", 5000)]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[x, 0], [x + 50, 0], [x + 50, 50], [x, 50], [x, 0]]]},
            "properties": {"classification": {"name": name}},
        }
        for name, x in squares
    ]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    found = plan(config)
    told = found["slides"][0]["warnings"]
    assert len(told) == 2 and "{'Gray mater': 2}; map them with label.rename" in told[0]
    assert told[1].startswith("1 of 4 annotated areas lie wholly off the slide")
    assert "S: annotation classes not in label.classes" in printed(found)
    tile.run(config, cohort_rows(config)[0])
    cause = read_json(tmp_path / "results" / "tile" / "S.json")["cause"]
    assert all(warning in cause for warning in told)
    assert plan(config, quick=True)["slides"][0]["warnings"] == []


def test_guards_between_blocks_are_taken_off(tmp_path: Path) -> None:
    """Ten columns of coarsest tiles, two of them guards: what the stages cut, not what the fractions say."""
    pixels = np.random.default_rng(0).integers(60, 200, (128, 10 * 128, 3)).astype(np.uint8) // [1, 3, 2]
    write_tiff(tmp_path / "s.tiff", [pixels.astype(np.uint8)], 0.25)
    write_sheet(tmp_path / "slides.tsv", [{"slide_id": "S", "path": "s.tiff", "patient_id": "P"}])
    cohort = {"sheet": str(tmp_path / "slides.tsv"), "split_by": "block"}
    ladder = {"magnifications": [10, 40], "tile_px": 32}
    config = parse_config({"results": str(tmp_path / "results"), "cohort": cohort, "tile": ladder})
    found = plan(config)
    rows = run_all(config) / "shard" / "S.parquet"
    assert found["slides"][0]["blocks"] == {"train": 0.6, "val": 0.0, "test": 0.2}
    assert found["totals"]["cut"] == len(pd.read_parquet(rows)) == 8 * (1 + 16 + 1 + 16)
    assert "guards are taken off" in found["how"]["samples"]


def test_a_synthetic_cohort_is_made_before_it_is_planned(tmp_path: Path) -> None:
    with pytest.raises(MadError, match="`mad synth` makes it"):
        plan(parse_config({"results": str(tmp_path)}))


def slide(tissue: int, *, annotated: bool = True, split: str | None = "train") -> dict[str, Any]:
    levels = {
        "10x": {"tiles": 100, "whole": 90, "tissue": tissue},
        "40x": {"tiles": 1600, "whole": 1500, "tissue": 1000},
    }
    blocks = {"train": 0.7, "val": 0.1, "test": 0.2}
    return {"annotated": annotated, "split": split, "blocks": blocks, "magnifications": levels, "samples": {}}


def caps(**sample: Any) -> Config:
    return parse_config({"sample": sample, "label": {"classes": ["A", "B", "Background"]}})


def shared(config: Config, slides: list[dict[str, Any]]) -> Iterator[dict[str, int]]:
    share_samples(config, LADDER, slides)
    return (each["samples"] for each in slides)


def test_caps_bound_the_samples() -> None:
    """Of 80 parents 2 x 15 are left (Background makes no pairs), in proportion; standalone tiles may be Background."""
    config = caps(max_pairs={"10x-40x": 15}, max_standalone={"10x": 20, "40x": None})
    first, second = shared(config, [slide(60), slide(20)])
    assert (first["10x-40x"], second["10x-40x"]) == (22, 8)
    assert first["10x"] == second["10x"] == 30  # 2 x 90 whole tiles, glass among them, under 3 x 20
    assert first["40x"] == 1500
    assert "2.5x-10x" not in first and "2.5x" not in first  # the slides have no 2.5x
    (free,) = shared(caps(), [slide(60)])
    assert free["10x-40x"] == 60


def test_caps_of_tests_of_unlabelled_slides_and_of_blocks() -> None:
    config = caps(max_pairs={"10x-40x": 10}, max_unlabelled=7, test_share=0.5)
    train, test, bare = shared(config, [slide(60), slide(60, split="test"), slide(60, annotated=False)])
    assert (train["10x-40x"], test["10x-40x"], bare["10x-40x"]) == (20, 10, 7)
    assert bare["10x"] == 7
    (blocks,) = shared(config, [slide(60, split=None)])
    assert blocks["10x-40x"] == 20 + 6 + 10  # val: .1 of 60, below its cap


def test_bytes_of_samples() -> None:
    assert member_bytes(np.array([1, 512, 513])).tolist() == [1024, 1024, 1536]
    sizes = {"10x": 3000.0, "40x": 2000.0}
    assert shard_bytes({"10x-40x": 2, "40x": 3}, sizes, LADDER) == 2 * (3000 + 16 * 2000 + 1024) + 3 * (2000 + 1024)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "~0 kB"), (999_400, "~999 kB"), (1e6, "~1 MB"), (7.25e10, "~72.5 GB"), (3e16, "~3e+04 TB")]
)
def test_sizes_are_readable(size: float, text: str) -> None:
    assert _size(size) == text


def test_trainings_are_timed_by_one_that_ended(slides: Path, tmp_path: Path) -> None:
    runs = [{"name": name, "method": "mad", "steps": 7200} for name in ("old", "new")]
    config = configure(tmp_path, slides, runs=runs)
    write_json(
        Path(config.results) / "train" / "old" / "summary.json", {"steps": 100, "seconds": 50.0, "device": "cuda"}
    )
    old, new = plan(config, quick=True)["runs"]
    assert old["hours"] == pytest.approx(1) and "cuda" in old["how"]
    assert new["hours"] is None and "unknown" in new["how"]


def printed(found: dict[str, Any]) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(*render(found), sep="\n")
    return console.export_text()


def test_the_plan_is_json_and_is_printed(before: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads(json.dumps(before, allow_nan=False)) == before
    write_json(tmp_path / "plan.json", before)
    assert read_json(tmp_path / "plan.json") == before
    text = printed(before)
    for word in ("S01", "2 slides", "256 (~", "stage shard", "at most", "upper estimate"):
        assert word in text
    many = {**before, "slides": before["slides"] * 20}
    assert "… 20 more" in printed(many)
