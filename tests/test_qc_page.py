"""The cohort's QC page: what failed stands first, numbers counted by hand, text escaped, small and quick for 1,000 slides."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from mad.config import parse_config
from mad.config.model import LabelConfig
from mad.files import MadError, read_json, write_json, write_parquet
from mad.reporting.overlay import MAX_SIDE, PALETTE, class_colours, rgb, write_overlay
from mad.reporting.qc import slide_table
from mad.reporting.qc_page import qc_page
from mad.reporting.quality import Facts, cohort_quality, exit_line, slide_facts
from mad.stages import qc

EVIL = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "br", "img", "input"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def cohort_row(slide: str, **more: object) -> dict[str, object]:
    row = {"slide_id": slide, "patient_id": f"P{slide}", "split": "train", "annotation": f"{slide}.geojson"}
    return {**row, "site": None, "scanner": pd.NA, "stain": "H&E", **more}


def told(**more: object) -> dict[str, object]:
    scale = {"mpp": 0.25, "mpp_source": "vendor property", "width": 1000, "height": 900}
    return {"status": "ok", "cause": None, **scale, "tissue_share": 0.5, "pen_share": 0.0, **more}


def tile_rows(n: int = 8, **more: object) -> pd.DataFrame:
    """Half of the tiles at 10x, half at 40x; one blank, one on the edge."""
    table = pd.DataFrame({"tile_id": [f"t{k}" for k in range(n)], "magnification": [10.0, 40.0] * (n // 2)})
    table["status"] = ["ok"] * (n - 2) + ["blank", "edge"]
    table["label"] = pd.array(["Gray Matter", None] * (n // 2), dtype="string")
    table["tissue"], table["pen"] = np.float32(1), np.float32(0)
    return table.assign(**more)


def shard_rows(blur: float = 100.0, n: int = 6, **more: object) -> pd.DataFrame:
    table = pd.DataFrame({"tile_id": [f"t{k}" for k in range(n)], "magnification": [10.0, 40.0] * (n // 2)})
    return table.assign(split="train", status="ok", blur=np.float32(blur)).assign(**more)


def slides() -> list[Facts]:
    return [
        slide_facts(cohort_row("A"), told(), tile_rows(), shard_rows()),
        slide_facts(cohort_row("B", split="test", annotation=None), told(), tile_rows(label=None), shard_rows(110, split="test")),
        slide_facts(cohort_row("C"), told(pen_share=0.02), tile_rows(pen=0.3), shard_rows(5)),
        slide_facts(
            cohort_row("D", patient_id="PA"), told(status="no tissue", tissue_share=0.0, cause="no tissue found"),
            tile_rows(status="blank", label=None, tissue=0), shard_rows(n=0),
        ),
        slide_facts(cohort_row("E"), {"status": "failed", "cause": f"E.svs: {EVIL}"}, tile_rows(2)[:0], shard_rows(n=0)),
        slide_facts(cohort_row("F"), None, None, None),
    ]  # fmt: skip


def test_facts_of_a_slide_are_counted() -> None:
    facts = slides()[0]
    assert facts["state"] == "ok" and facts["mend"] is None and facts["scanner"] is None and facts["annotated"]
    assert facts["tiles"] == {"10x": {"ok": 3, "blank": 1, "edge": 0}, "40x": {"ok": 3, "blank": 0, "edge": 1}}
    assert facts["labels"] == {"10x": {"Gray Matter": 3}} and facts["labelled_share"] == 0.5
    assert facts["in_shards"] == {"10x": 3, "40x": 3} and facts["splits"] == {"train": 6} and facts["inked"] == 0


def test_a_tile_in_several_samples_counts_once_and_glass_has_no_focus() -> None:
    twice = pd.concat([shard_rows(), shard_rows().assign(status=["ok"] * 5 + ["unreadable"])])
    tiles = tile_rows(tissue=[0.1, 1, 1, 1, 1, 1, 1, 1])
    facts = slide_facts(cohort_row("A"), told(), tiles, twice)
    assert facts["in_shards"] == {"10x": 3, "40x": 3} and facts["unreadable"] == 1
    assert {m: len(values) for m, values in facts["focus"].items()} == {"10x": 2, "40x": 3}


def test_an_unreadable_tile_of_two_samples_counts_once() -> None:
    """As a child of one pair and the parent of another: two rows of the shard table, one tile to mend."""
    twice = pd.concat([shard_rows(), shard_rows().assign(status="unreadable").iloc[:2]] * 2)
    assert slide_facts(cohort_row("A"), told(), tile_rows(), twice)["unreadable"] == 2


@pytest.mark.parametrize(
    ("label", "glass", "remark"),
    [
        (None, "Background", ["annotated, but no tile got a label"]),
        ("Background", "Background", ["annotated, but no tile got a label other than Background"]),
        ("Background", None, []),  # drawn by hand
        ("Gray Matter", "Background", []),
    ],
)
def test_glass_is_no_label_that_an_annotation_gave(label: str | None, glass: str | None, remark: list[str]) -> None:
    facts = slide_facts(cohort_row("A"), told(), tile_rows(label=label), shard_rows())
    assert cohort_quality([facts], glass)["slides"][0]["warnings"] == remark


def test_the_cohort_is_summed_and_the_bad_stand_first() -> None:
    quality = cohort_quality(slides())
    assert [facts["slide_id"] for facts in quality["slides"]] == ["E", "D", "F", "C", "A", "B"]
    assert quality["states"] == {"failed": 1, "no tile": 1, "not made yet": 1, "ok": 3}
    assert quality["num_patients"] == 5 and quality["num_annotated"] == 5 and quality["inked_slides"] == 1
    assert quality["splits"]["train"] == {"slides": 5, "patients": 4, "tiles": 12}
    assert quality["splits"]["test"] == {"slides": 1, "patients": 1, "tiles": 6}
    assert quality["scales"]["10x"] == {"slides": 4, "ok": 9, "blank": 7, "edge": 0, "in shards": 9}
    assert quality["classes"] == {"Gray Matter": {"slides": 2, "10x": 6}}
    assert quality["mpp_sources"] == {"vendor property": 4} and quality["mpp_histogram"] == {"0.25": 4}
    by_name = {facts["slide_id"]: facts for facts in quality["slides"]}
    assert quality["focus"]["10x"] == {"median": 100.0, "threshold": 20.0}
    assert by_name["C"]["focus"]["40x"] == {"median": 5.0, "blurred": 1.0, "tiles": 3}
    assert by_name["A"]["focus"]["40x"]["blurred"] == 0 and not by_name["A"]["warnings"]
    text = " ".join(by_name["C"]["warnings"])
    assert "2.0% of the tissue (6 tiles)" in text and "100% of the 10x tiles are blurred" in text
    assert "tile.tissue.method" in by_name["D"]["mend"] and "Mend the file" in by_name["E"]["mend"]
    json.dumps(quality, allow_nan=False)


def test_the_exit_line_counts_what_failed() -> None:
    assert (
        exit_line(cohort_quality(slides()), "p.html") == "1 of 6 slides failed, 1 gave no tile, 1 with warnings: p.html"
    )
    assert exit_line(cohort_quality(slides()[:3]), "p.html") == "3 slides, none failed, 1 with warnings: p.html"
    assert exit_line(cohort_quality(slides()[:1]), "p.html") == "1 slides, none failed: p.html"


def test_the_page_is_whole_escaped_and_self_contained() -> None:
    page = Page(qc_page(cohort_quality(slides())))
    assert len(page.all("script")) == 1 and not page.all("link")
    assert any(EVIL in text for text in page.text)
    assert not any("src" in attributes for attributes in page.all("script"))
    pictures = page.all("img")
    assert all(p["loading"] == "lazy" and str(p["src"]).startswith("../tile/") for p in pictures)
    assert len(pictures) == 5  # the failed slide has none
    text = "".join(page.text)
    assert text.index("Failed, or without") < text.index("E.svs") < text.index("pen marks on 2") < text.index("Splits")
    assert sum(attributes.get("data-kind") is not None for attributes in page.all("tr")) == 6


def test_an_evil_slide_id_reaches_no_attribute() -> None:
    """The sheet refuses such ids, the page does not rely on it."""
    facts = slide_facts(cohort_row('"><img src=x onerror=alert(1)>'), told(), tile_rows(), shard_rows())
    page = Page(qc_page(cohort_quality([facts])))
    assert all(str(p["src"]).startswith("../tile/%22%3E") and "onerror" not in p for p in page.all("img"))


def test_a_cohort_of_nothing_has_a_page() -> None:
    assert "None." in "".join(Page(qc_page(cohort_quality([]))).text)
    unmade = cohort_quality([slide_facts(cohort_row("A"), None, None, None)])
    assert unmade["states"]["not made yet"] == 1
    Page(qc_page(unmade))


def test_slides_without_tiles_come_first_in_the_table() -> None:
    text = slide_table(slides()).markdown()
    names = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert names == ["D", "E", "F", "A", "B", "C"]
    assert "| A | PA | train | 0.2500 | vendor property | 6 | 1 | 1 | 50 | 0.0 | 6 | 0 | – |" in text
    assert "3 slide(s) gave no tile: D, E, F" in text


def write_cohort(folder: Path, count: int, tiles: int) -> None:
    """Results of `count` slides with `tiles` tiles each, as the stages write them; the first failed."""
    names = [f"S{n:04d}" for n in range(count)]
    rows = pd.DataFrame([cohort_row(name) | {"scanner": "AT2", "site": EVIL} for name in names])
    write_parquet(folder / "cohort" / "slides.parquet", rows.astype("string"))
    text = {"tile_id": "string", "status": "string", "label": "string"}
    table, shard = tile_rows(tiles).astype(text), shard_rows(n=tiles // 4).astype({"tile_id": "string"})
    for name in names:
        failed = name == "S0000"
        facts = {"status": "failed", "cause": "broken"} if failed else told()
        write_json(folder / "tile" / f"{name}.json", facts)
        write_parquet(folder / "tile" / f"{name}.parquet", table[: 0 if failed else None])
        write_parquet(folder / "shard" / f"{name}.parquet", shard[: 0 if failed else None])


def test_the_stage_writes_page_and_numbers(tmp_path: Path) -> None:
    config = parse_config({"results": str(tmp_path)})
    with pytest.raises(MadError, match="mad cohort"):
        qc.run(config)
    write_cohort(tmp_path, 3, 40)
    qc.run(config)
    found = read_json(tmp_path / "report" / "qc.json")
    assert found["line"] == f"1 of 3 slides failed, 0 gave no tile: {tmp_path}/report/qc.html"
    assert found["slides"][0]["cause"] == "broken" and found["splits"]["train"]["tiles"] == 20
    page = Page((tmp_path / "report" / "qc.html").read_text())
    assert any(EVIL in text for text in page.text)


def test_a_thousand_slides_give_a_small_page() -> None:
    one = slide_facts(cohort_row("A", site="a site"), told(cause="x" * 60), tile_rows(), shard_rows())
    start = time.perf_counter()
    page = qc_page(cohort_quality([{**one, "slide_id": f"S{n:04d}-{'y' * 30}"} for n in range(1000)]))
    assert time.perf_counter() - start < 10
    assert len(page.encode()) < 2_000_000


def test_the_picture_has_a_legend_beside_it_and_stays_small(tmp_path: Path) -> None:
    label = LabelConfig(classes=["Gray Matter", "Background"])
    overview = np.full((500, 3000, 3), 240, np.uint8)
    raster = np.full((500, 3000), 255, np.uint8)
    raster[100:300, 100:900], raster[:, 2000:] = 0, 1
    tissue = raster == 0
    write_overlay(tmp_path / "a.png", overview, title="A", mpp=4, tissue=tissue, raster=raster, label=label)
    picture = cv2.cvtColor(cv2.imread(str(tmp_path / "a.png")), cv2.COLOR_BGR2RGB)
    band = picture.shape[0] - round(500 * MAX_SIDE / 3000)
    assert picture.shape[1] == MAX_SIDE and 30 < band < 120
    blue = np.array(rgb(class_colours(label)["Gray Matter"]))
    assert ((picture[:band] == blue).all(axis=2)).sum() > 200  # in the legend
    assert (picture[band + 2 :, 1200:] == 240).all()  # background is left plain
    bar = (picture[21, 1000:] == 0).all(axis=1).sum()
    assert abs(bar * 4 * 3000 / MAX_SIDE - 2000) < 4 * 3000 / MAX_SIDE * 3  # 2 mm of 12
    write_overlay(tmp_path / "b.png", overview[:20, :30], title="tiny")
    assert cv2.imread(str(tmp_path / "b.png")).shape[1] >= 500
    assert len({*PALETTE}) == len(PALETTE)


@pytest.mark.workflow
def test_the_page_needs_no_training_and_belongs_to_everything(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    (tmp_path / "config.yaml").write_text(f"results: {tmp_path}/results\n")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile"), "--directory", str(root)]
    command += ["--configfile", str(tmp_path / "config.yaml"), "--cores", "1", "--dry-run", "--nolock"]
    planned = {}
    for target in ("qc", "all"):
        done = subprocess.run([*command, target], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        planned[target] = {line.split()[0] for line in done.stdout.splitlines() if line.split()}
    assert {"qc", "tile_slide", "shard_slide"} <= planned["qc"] and {"qc", "train_run"} <= planned["all"]
    assert not planned["qc"] & {"train_run", "embed_encoder", "evaluate_encoder", "report"}
