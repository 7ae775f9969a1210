"""A cohort of a thousand slides: the workflow plans every job of it, before one slide is opened."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mad.slides.sheet import write_sheet

pytestmark = pytest.mark.workflow
ROOT = Path(__file__).parents[1]
NUM_SLIDES = 1000


@pytest.mark.parametrize("there", [True, False], ids=["files", "no files"])
def test_a_dry_run_lists_every_job_of_a_large_cohort(tmp_path: Path, there: bool) -> None:
    rows = [{"slide_id": f"S{n}", "path": f"{n}.svs", "patient_id": f"P{n // 2}"} for n in range(NUM_SLIDES)]
    write_sheet(tmp_path / "slides.tsv", rows)
    for row in rows if there else rows[:1]:
        (tmp_path / row["path"]).touch()
    settings = {"results": str(tmp_path / "results"), "cohort": {"sheet": str(tmp_path / "slides.tsv")}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(ROOT)]
    command += ["--cores", "1", "--configfile", str(tmp_path / "config.json"), "--dry-run", "shard_cohort"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (done.stdout + done.stderr).splitlines()
    jobs = Counter(line.split()[1].rstrip(":") for line in lines if line.startswith(("rule ", "localrule ")))
    assert jobs == {"tile_slide": NUM_SLIDES, "tiled": 1, "sample": 1, "shard_slide": NUM_SLIDES, "shard_cohort": 1}
    wildcards = Counter(line.strip() for line in lines if line.strip().startswith("wildcards: slide="))
    assert wildcards == {f"wildcards: slide=S{n}": 2 for n in range(NUM_SLIDES)}
    records, num_inputs = 0, 0  # what Snakemake writes down: every input of a job for every output of it
    for kind, _, paths in (line.strip().partition(": ") for line in lines):
        if kind == "input":
            num_inputs = paths.count(", ") + 1
        elif kind == "output":
            records += num_inputs * (paths.count(", ") + 1)
        elif kind.startswith(("rule ", "localrule ")):
            num_inputs = 0
    assert 4 * NUM_SLIDES < records < 10 * NUM_SLIDES


def test_a_cohort_without_any_slide_is_taken_for_a_disk_that_is_not_mounted(tmp_path: Path) -> None:
    """Quarantining every slide would empty the results of an earlier run."""
    write_sheet(tmp_path / "slides.tsv", [{"slide_id": "S1", "path": "gone.svs", "patient_id": "P1", "split": "train"}])
    settings = {"results": str(tmp_path / "results"), "cohort": {"sheet": str(tmp_path / "slides.tsv")}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(ROOT)]
    command += ["--cores", "1", "--dry-run", "tile", "--configfile", str(tmp_path / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "is their disk mounted?" in done.stdout + done.stderr


def test_a_training_asks_for_memory_for_its_shards(tmp_path: Path) -> None:
    """Of each process, by what the tables take on the disk; with some still to be made, for those that are there."""
    write_sheet(
        tmp_path / "slides.tsv", [{"slide_id": f"S{n}", "path": f"{n}.svs", "patient_id": f"P{n}"} for n in (1, 2)]
    )
    (tmp_path / "1.svs").touch()
    run = {"name": "large", "method": "mad", "steps": 4, "batch": 4, "warmup": 0, "freeze_last_layer": 0}
    settings = {
        "results": str(tmp_path / "results"), "cohort": {"sheet": str(tmp_path / "slides.tsv"), "split_by": "block"},
        "runs": [run | {"runtime": {"processes": 2, "workers": 3}}], "encoders": [],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    command += ["--cores", "8", "--configfile", str(tmp_path / "config.json"), "--dry-run", "train"]
    (tmp_path / "results" / "shard").mkdir(parents=True)
    for rows in (0, 10**6):
        with (tmp_path / "results" / "shard" / "S1.parquet").open("wb") as file:
            file.truncate(49 * rows)
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "Agg"})
        told = (done.stdout + done.stderr).split("rule train_run:")[-1]
        assert f"mem_mb={2 * (11_000 + rows * 588 // 10**6)}," in told, told
