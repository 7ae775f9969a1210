"""The scripts of benchmarks/: each runs to its end at its smallest and prints its figures; the command lines quoted parse."""

import argparse
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import cv2
import pytest
import tifffile
from conftest import write_tiff
from pipeline import configure, run_all

from mad.files import write_json

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
XMAG = ROOT / "benchmarks" / "xmag.py"
N = r" +[\d,.]+"
"""A number that a script prints."""

RUNS: list[tuple[str, str, list[str]]] = [
    (
        "alignment",
        "SLIDE --tile-px 112",
        [rf"^S01 +{pyramid} +{pair}{N * 4}$" for pyramid in ("scanner", "area") for pair in ("2.5x-10x", "10x-40x")],
    ),
    (
        "annotations",
        "--polygons 100 --repeats 1 --size 2000 1500",
        [
            *[rf"^mask {name}{N} s{N} Mpx/s" for name in ("tiled.tif", "bare.tif", "grey.png")],
            *[rf"^read {name}{N} s{N} polygons/s" for name in ("a.geojson", "a.geojson.gz", "a.xml")],
            *[rf"^raster {way}{N} s.* covers{N} cells, \d+ unlike" for way in ("mad", "cv2 loop")],
            rf"^raster skimage loop{N} s.* covers{N} cells, 0 unlike",
        ],
    ),
    (
        "embedding",
        "--results RESULTS --model test_vit --tiles 4 --rounds 1",
        [*[rf"^  {side}{N} tiles/s, share" for side in ("mad", "plain", "plain-bf16")], r"mad and plain: (0\.999|1\.0)"],
    ),
    (
        "evaluation",
        "--tiles 3400 --dim 16 --threads 1 --repeats 1 --probe-steps 2 --device cpu",
        [
            *[
                rf"^ *{name} +mad{N} s .* equal: "
                for name in (
                    "k-NN, 6 banks", "of these the whole one", "K-Means, 20 starts", "probe, 5 strengths", "Davies-Bouldin x 2",
                    "AMI", r"PCA \(theirs: full\)", "theirs: covariance", "cosines of all pairs", "retrieval in slides",
                )
            ],
            rf"^together +mad{N} s",
            rf"^paper's probe, 5 runs +mad{N} s",
        ],
    ),
    (
        "evaluation",
        "--large --tiles 3400 --dim 16 --threads 1 --device cpu --only AMI",
        [rf"^{name}{N} s" for name in ("AMI", "together")],
    ),
    (
        "index",
        "--slides 10 --pairs 2",
        ["^10 slides, 552 rows of train and val$", *[rf"^{side}{N} s .*{N} GiB held,{N} at" for side in ("mad", "plain")]],
    ),
    (
        "loader",
        "--results RESULTS --batch 2 --steps 1 --rounds 1",
        [
            rf"^{method}: {tiles} tiles of 112 px.*\n" + r"\n".join(rf"  {side}{N} tiles/s.*" for side in sides)
            for sides in [("decode", "loader", "views", "stream")]
            for method, tiles in (("mad", 10), ("dinov2", 2))
        ],
    ),
    (
        "readers",
        "SLIDE --side 896 --repeats 1",
        [*[rf"^{name}{N} ms per" for name in (r"mad \(TiffReader\)", "OpenSlide", "libvips")], "^4 footprints of 896 px"],
    ),
    (
        "selection",
        "--slides 14 --threads 1",  # fewer leave a split empty
        [rf"^{part}{N} s" for part in ("cohort of 14 slides written in", "dry run:", "sample: ")],
    ),
    (
        "tiling",
        "TILES --tile-px 56 --repeats 1 --big",
        [
            *[rf"^{side}{N} tiles/s" for side in ("mad", "usual", "dzsave", "limit")],
            rf"^two slides on two cores:{N} x",
            *[rf"^4096 x 3072 px: mad {stage}{N} s" for stage in ("tile", "shard")],
            rf"^ {N} tiles,{N} tiles/s",
        ],
    ),
    (
        "training",
        "--tile-px 32 --batch 2 --prototypes 16 --rounds 1 --steps 1 --checkpointing",
        [
            rf"^{method}: .* {images} images.*\n"
            + "".join(rf"  {side}{N} images/s .*\n" for side in ("mad", "plain", "plain-fp32"))
            + r"  memory: peak \d"
            for method, images in (("mad", 12), ("dinov2", 24))
        ],
    ),
    (
        "waiting",
        "--rounds 1 --steps 1 --threads 1",
        [
            rf"^1 threads, {others} other processes\n  spinning:{N} s.*\n  sleeping:{N} s.*\n  sleeping is{N} x"
            for others in (0, 1)
        ],
    ),
    (
        "xmag",
        "--size 1792 1792 --tile-px 112 --sample 0 --repeats 1 --threads 1 --device cpu "
        "--teacher timm:test_vit --student timm:test_vit",
        [
            rf"^tile ratio:{N}",
            rf"^teacher timm:test_vit at 20x.*\n  (\d+) of \1 tiles encoded:{N} ms",
            rf"^student timm:test_vit at 5x.*\n  (\d+) of \1 tiles encoded:{N} ms",
            rf"^encoder ratio:{N}",
            *[rf"^whole-slide ratio, {how}:{N}" for how in ("computed", "measured")],
        ],
    ),
]  # fmt: skip
"""Script, arguments of a run of seconds, what its output holds."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, slides: Path) -> dict[str, Path]:
    """What the placeholders stand for: a slide, a finished stage `shard`, a slide whose levels are whole numbers of tiles."""
    folder = tmp_path_factory.mktemp("benchmarks")
    config = configure(folder, slides)
    write_json(run_all(config) / "config.json", config.model_dump(mode="json"))  # as the workflow does
    pixels = tifffile.imread(slides / "S01.tiff")[:1024, :1024]
    levels = [cv2.resize(pixels, None, fx=1 / d, fy=1 / d, interpolation=cv2.INTER_AREA) for d in (1, 4, 16)]
    write_tiff(folder / "tiles.tiff", levels, mpp=0.25, tile=(64, 64), compression="jpeg")
    return {"SLIDE": slides / "S01.tiff", "RESULTS": Path(config.results), "TILES": folder / "tiles.tiff"}


def test_every_script_is_run() -> None:
    assert {name for name, _, _ in RUNS} == {path.stem for path in SCRIPTS}


@pytest.mark.parametrize(("name", "arguments", "figures"), RUNS, ids=[" ".join(run[:2])[:24] for run in RUNS])
def test_a_script_prints_its_figures(name: str, arguments: str, figures: list[str], files: dict[str, Path]) -> None:
    """On a CPU and with one thread, as a process of its own; how fast, it does not ask."""
    words = [str(files.get(word, word)) for word in arguments.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for figure in figures:
        assert re.search(figure, run.stdout, re.M), f"no {figure} in\n{run.stdout}"


def quoted(text: str, script: str) -> list[list[str]]:
    """Arguments of the command lines of a script: in `code`, or indented and apart from what they are for by spaces."""
    name = re.escape(f"benchmarks/{script}")
    lines = re.sub(r" *\\?\n *(?=\[|--)", " ", text)
    found = re.findall(rf"(?:`|^ {{4}})(?:\w+=\S+ )?(?:python {name}|{name}(?= --))( .*?)?(?=`| {{3}}|$)", lines, re.M)
    return [re.sub(r"[][]", "", line).split() for line in found]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_quoted_command_lines_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its docstring and of the documentation, with placeholders for files."""

    class Parsed(Exception):  # noqa: N818
        """Nothing is run."""

    def parse(parser: argparse.ArgumentParser) -> None:
        parse_args(parser)
        raise Parsed

    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.syspath_prepend(path.parent)
    with mock.patch.dict(os.environ):
        script = runpy.run_path(str(path))
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        lines = [line for text in (script["__doc__"], *map(Path.read_text, PAGES)) for line in quoted(text, path.name)]
        assert lines, "its docstring says how it is called"
        for line in lines:
            monkeypatch.setattr(sys, "argv", [str(path), *line])
            with pytest.raises(Parsed):
                script["main"]()


@pytest.mark.parametrize(
    ("arguments", "hidden"),
    [
        (["--device", "cpu"], True),
        (["--device=cpu"], True),
        (["a.svs", "--device=cpu", "--repeats", "1"], True),
        (["--device=cuda"], False),
        (["--device"], False),
        ([], False),
    ],
)
def test_the_cpu_is_taken_however_the_device_is_spelt(
    arguments: list[str], hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of xmag.py, before torch sees the machine; an option without its value is left for argparse to refuse."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(sys, "argv", [str(XMAG), *arguments])
    before, mark, _ = XMAG.read_text().partition("\nimport numpy")
    exec(compile(before, str(XMAG), "exec"), {"__name__": "xmag"})
    assert mark and os.environ["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "0")
