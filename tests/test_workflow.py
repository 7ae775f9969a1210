"""The workflow itself: what reruns when, the same bytes whatever the cores, and weights that outlive failures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from mad.config.synthetic import SyntheticConfig
from mad.slides.sheet import write_sheet
from mad.slides.synthetic.slide import write_slide

pytestmark = pytest.mark.workflow
ROOT = Path(__file__).parents[1]
RUN = {
    "name": "tiny",
    "method": "mad",
    "backbone": {"model": "vit_tiny_patch16_224", "args": {"embed_dim": 48, "depth": 1, "num_heads": 2}},
    "steps": 4,
    "warmup": 1,
    "freeze_last_layer": 1,
    "batch": 4,
    "head": {"hidden": 32, "bottleneck": 16, "prototypes": 32},
    "runtime": {"threads": 1, "health_samples": 8},
}


class Project:
    """A folder with three small slides, a configuration, and Snakemake to run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slides = ["S01", "S02", "S03"]
        for slide in self.slides:
            write_slide(SyntheticConfig(width=1792, height=1792), slide, folder)
        self.config: dict[str, object] = {
            "results": str(folder / "results"),
            "cohort": {"sheet": str(folder / "slides.tsv")},
            "sample": {"max_standalone": {"10x": 3, "40x": 4}, "max_pairs": {"10x-40x": 2}},
            "runs": [RUN],
            "encoders": [],
        }
        self.write(self.slides[:2])

    def write(self, slides: list[str]) -> None:
        splits = {"S01": "train", "S02": "test", "S03": "train"}
        records = [
            {"slide_id": s, "path": f"{s}.tiff", "patient_id": s, "annotation": f"{s}.geojson", "split": splits[s]}
            for s in slides
        ]
        write_sheet(self.folder / "slides.tsv", records)

    def snakemake(self, *arguments: str, check: bool = True) -> str:
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(ROOT)]
        command += ["--configfile", str(self.folder / "config.yaml"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "Agg"})
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def planned(self, *targets: str) -> set[str]:
        """Jobs that a dry run announces, as `rule` or, where it has wildcards, `rule:slide`, `rule:target/aggregator`."""
        jobs, rule = set(), ""
        for line in self.snakemake("--cores", "1", "--dry-run", *targets).splitlines():
            if line.startswith(("rule ", "localrule ")):
                rule = line.split()[1].rstrip(":")
                jobs.add(rule)
            elif line.strip().startswith("wildcards: "):
                jobs.discard(rule)
                values = [part.split("=")[1] for part in line.strip().removeprefix("wildcards: ").split(", ")]
                jobs.add(f"{rule}:{'/'.join(values)}")
        return jobs

    def bytes(self) -> dict[str, bytes]:
        results = Path(str(self.config["results"]))
        return {
            str(path.relative_to(results)): path.read_bytes()
            for stage in ("tile", "sample", "shard")
            for path in sorted((results / stage).rglob("*"))
            if path.suffix in (".parquet", ".tar", ".json")
        }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project(tmp_path_factory.mktemp("project"))
    made.snakemake("--cores", "2", "shard_cohort")
    return made


def test_cores_do_not_matter_and_a_second_run_does_nothing(project: Project, tmp_path: Path) -> None:
    assert "Nothing to be done" in project.snakemake("--cores", "2", "shard_cohort")
    first = project.bytes()
    kept, project.config["results"] = project.config["results"], str(tmp_path / "results")
    project.snakemake("--cores", "1", "shard_cohort")
    assert project.bytes() == first
    project.config["results"] = kept


def test_an_annotation_reruns_its_slide_and_what_depends_on_it(project: Project) -> None:
    path = project.folder / "S01.geojson"
    original = path.read_text()
    content = json.loads(original)
    content["features"] = [
        f for f in content["features"] if f["properties"]["classification"]["name"] != "White Matter"
    ]
    path.write_text(json.dumps(content))
    assert {"tile_slide:S01", "sample"} <= project.planned("shard_cohort")
    assert "tile_slide:S02" not in project.planned("shard_cohort")
    before = project.bytes()
    project.snakemake("--cores", "2", "shard_cohort")
    after = project.bytes()
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert "tile/S01.parquet" in changed and not any("S02" in name for name in changed)
    path.write_text(original)
    project.snakemake("--cores", "2", "shard_cohort")
    assert project.bytes() == before


def test_a_changed_cap_samples_anew_but_tiles_nothing(project: Project) -> None:
    kept, project.config["sample"] = project.config["sample"], {"max_standalone": {"40x": 2}}
    jobs = project.planned("shard_cohort")
    assert "sample" in jobs and not any(job.startswith("tile_slide") for job in jobs)
    project.config["sample"] = kept


def test_tables_and_selections_that_are_missing_are_made_again_where_they_are_needed(
    project: Project, tmp_path: Path
) -> None:
    results = Path(str(project.config["results"]))
    table, selection, shards = (results / stage / "S01.parquet" for stage in ("tile", "sample", "shard"))
    shutil.move(selection, tmp_path / "selection")
    shutil.move(shards, tmp_path / "shards")
    jobs = {"tiled", "sample", "shard_slide:S01"}
    assert project.planned(str(shards)) == jobs and project.planned(str(selection)) == {"tiled", "sample"}
    shutil.move(table, tmp_path / "table")
    assert project.planned(str(shards)) == jobs | {"tile_slide:S01"}
    for path, name in ((table, "table"), (selection, "selection"), (shards, "shards")):
        shutil.move(tmp_path / name, path)
    assert project.planned("shard_cohort") == set()


def test_tables_that_changed_are_selected_from_though_the_workflow_was_stopped_before(project: Project) -> None:
    results = Path(str(project.config["results"]))
    annotation = project.folder / "S01.geojson"
    original = annotation.read_text()
    annotation.write_text(original.replace("White Matter", "Gray Matter"))
    project.snakemake("--cores", "2", "--until", "tiled", "--", "shard_cohort")
    assert (results / "tile" / "all.txt").exists()
    assert "sample" in project.planned("shard_cohort") and "tile_slide:S01" not in project.planned("shard_cohort")
    annotation.write_text(original)
    project.snakemake("--cores", "2", "shard_cohort")
    assert not (results / "tile" / "all.txt").exists() and project.planned("shard_cohort") == set()


def test_adding_a_slide_tiles_that_slide_alone_and_does_not_retrain(project: Project) -> None:
    project.snakemake("--cores", "2", "train")
    weights = Path(str(project.config["results"])) / "train" / "tiny" / "encoder" / "model.safetensors"
    before = weights.read_bytes()
    project.write(project.slides)
    jobs = project.planned("train")
    assert {job for job in jobs if job.startswith("tile_slide")} == {"tile_slide:S03"}
    project.snakemake("--cores", "2", "train")
    assert weights.read_bytes() == before
    project.write(project.slides[:2])
    project.snakemake("--cores", "2", "train")


def test_a_new_recipe_or_force_retrains_though_the_data_change_as_well(project: Project) -> None:
    project.snakemake("--cores", "2", "train")
    kept, project.config["sample"] = project.config["sample"], {"max_standalone": {"40x": 2}}
    assert "sample" in project.planned("train") and "train_run:tiny" not in project.planned("train")
    project.config["runs"] = [{**RUN, "steps": 5}]
    assert "train_run:tiny" in project.planned("train")
    project.config["runs"] = [RUN]
    assert "rule train_run" in project.snakemake("--cores", "1", "--dry-run", "-R", "train_run", "--", "train")
    project.config["sample"] = kept


def test_a_training_that_fails_on_rerun_deletes_no_weights(project: Project) -> None:
    project.snakemake("--cores", "2", "train")
    results = Path(str(project.config["results"]))
    weights = results / "train" / "tiny" / "encoder" / "model.safetensors"
    before = weights.read_bytes()
    hidden = results / "shard" / "S01"
    shutil.move(hidden, results / "away")
    project.config["runs"] = [
        {**RUN, "steps": 5}
    ]  # another recipe: there is something to train, and the tars are missed
    output = project.snakemake("--cores", "1", "train", check=False)
    project.config["runs"] = [RUN]
    assert "Error in rule train_run" in output
    shutil.move(results / "away", hidden)
    kept = [path for path in (results / "train" / "tiny").rglob("model.safetensors") if path.read_bytes() == before]
    assert kept, "the weights of the earlier training are gone"


def test_a_training_stopped_midway_is_not_put_aside_for_another_recipe(project: Project) -> None:
    project.snakemake("--cores", "2", "train")
    results = Path(str(project.config["results"]))
    folder = results / "train" / "tiny"
    for path in (folder / "summary.json", folder / "encoder" / "provenance.json"):  # as before the encoder is written
        path.unlink()
    project.config["runs"] = [{**RUN, "steps": 5}]
    assert "Error in rule train_run" in project.snakemake("--cores", "1", "train", check=False)
    assert "run.steps: 4 -> 5" in (results / "logs" / "train" / "tiny.log").read_text()
    assert (folder / "checkpoints" / "step_0000004.pt").exists()
    shutil.move(folder / "checkpoints", results / "kept")
    project.snakemake("--cores", "1", "train")
    project.config["runs"] = [RUN]
    assert (folder / "checkpoints" / "step_0000005.pt").exists()


def test_a_list_of_encoders_fans_out_and_a_new_one_is_made_alone(project: Project) -> None:
    """One row per encoder in every table of encoders; adding, changing or removing one leaves the others' files alone."""
    results = Path(str(project.config["results"]))
    project.config["evaluate"] = {"probe_steps": 20, "bootstrap_resamples": 20, "kmeans_starts": 2}
    first, second = {"name": "colour", "spec": "colour"}, {"name": "random", "spec": "random:tiny"}

    def files() -> dict[Path, int]:
        made = [path for stage in ("embed", "evaluate") for path in (results / stage / "colour").rglob("*")]
        return {path: path.stat().st_mtime_ns for path in made if path.is_file()}

    def rows(table: str) -> list[str]:
        found = pd.read_csv(results / "report" / "tables" / f"{table}.csv")
        return list(found.loc[found["source"] == "ours", "encoder"])

    project.config["encoders"] = [first]
    project.snakemake("--cores", "2", "report")
    before = files()
    assert {path.name for path in before} >= {"audit.json", "S01.npy", "S02.npy", "classification.json"}
    project.config["encoders"] = [second, first]
    assert project.planned("report") == {"embed_encoder:random", "evaluate_encoder:random", "report"}
    project.snakemake("--cores", "2", "report")
    assert files() == before
    for table in ("table3", "table4", "table5", "scales", "maps"):
        assert rows(table) == ["random", "colour"], table
    project.config["encoders"] = [{**second, "batch": 3}, first]
    assert project.planned("report") == {"embed_encoder:random", "evaluate_encoder:random", "report"}
    project.config["encoders"] = [first]
    assert project.planned("report") == {"report"}
    project.config["encoders"] = []


def test_a_mixer_makes_its_encoder_embed_whole_slides_and_reruns_alone(project: Project) -> None:
    mixer = {"name": "mma", "encoder": "colour", "magnifications": [10, 40], "width": 16, "depth": 1, "heads": 2}
    mixer |= {"steps": 2, "warmup": 1, "batch": 4}
    project.config |= {"encoders": [{"name": "colour", "spec": "colour"}], "mixers": []}
    project.snakemake("--cores", "2", "embed")
    project.config["mixers"] = [mixer]
    assert {"embed_encoder:colour", "mix_regions:mma"} <= project.planned("mix")
    project.snakemake("--cores", "2", "mix")
    tokens = Path(str(project.config["results"])) / "mix" / "mma" / "S02.npy"
    assert tokens.exists()
    project.config["mixers"] = [{**mixer, "runtime": {"threads": 1}}]
    assert project.planned("mix") == set()
    project.config["mixers"] = [{**mixer, "steps": 3}]
    assert project.planned("mix") == {"mix_regions:mma", "mix"}
    project.config |= {"encoders": [], "mixers": []}


def test_the_viewer_cuts_a_slide_again_only_for_itself(project: Project) -> None:
    project.snakemake("--cores", "2", "viewer")
    folder = Path(str(project.config["results"])) / "report" / "viewer"
    assert (folder / "index.html").exists() and [path.name for path in (folder / "pages").glob("*.html")] == [
        "S02.html"
    ]
    assert project.planned("viewer") == set()
    project.config["evaluate"] = {"segmentation_magnifications": [10]}
    assert project.planned("viewer") == {"viewer"}
    project.config["viewer"] = {"quality": 90}
    assert project.planned("viewer") == {"viewer_slide:S02", "viewer"}
    project.config["viewer"] = {"slides": "all"}
    assert {"viewer_slide:S01", "viewer"} <= project.planned("viewer")
    assert "viewer_slide:S02" not in project.planned("viewer")
    del project.config["evaluate"], project.config["viewer"]


def test_a_distillation_waits_for_its_teachers_embeddings_and_more_slides_retrain_nothing(project: Project) -> None:
    student = {"name": "student", "method": "xmag", "distill": {"teacher": "colour"}, "mix": {"10x-40x": 1}}
    student |= {key: RUN[key] for key in ("steps", "warmup", "batch", "runtime")}
    student["backbone"] = {"model": "vit_tiny_patch16_224", "args": {"patch_size": 14, "embed_dim": 48, "depth": 1}}
    project.config |= {
        "tile": {"tile_px": 112}, "runs": [student], "encoders": [{"name": "colour", "spec": "colour"}],
    }  # fmt: skip
    target = str(Path(str(project.config["results"])) / "train" / "student" / "summary.json")
    assert {"embed_encoder:colour", "train_run:student"} <= project.planned(target)
    project.snakemake("--cores", "2", target)
    assert json.loads(Path(target).read_text())["teacher_sha256"]
    project.write(project.slides)
    assert "train_run:student" not in project.planned(target)
    project.write(project.slides[:2])
    del project.config["tile"]
    project.config |= {"runs": [RUN], "encoders": []}


class Touched(Project):
    """Two slide-level targets by two aggregators, finished as far as Snakemake knows: every output is there, none was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [
            {"slide_id": f"S{n}", "path": f"S{n}.tiff", "patient_id": f"P{n}", "mpp": "0.25", "site": "a",
             "split": "train" if n else "test", "her2": "pos", "grade": "low", "note": ""}
            for n in range(3)
        ]  # fmt: skip
        self.config = {
            "results": str(folder / "results"),
            "cohort": {"sheet": str(folder / "slides.tsv")},
            "encoders": [{"name": "colour", "spec": "colour"}, {"name": "adapted", "spec": "adapter:head"}],
            "adapters": [{"name": "head", "encoder": "colour"}],
            "mixers": [{"name": "mma", "encoder": "colour"}],
            "biomarkers": {
                "targets": [{"name": "her2", "column": "her2"}, {"name": "grade", "column": "grade"}],
                "aggregators": [{"name": "plain", "encoder": "adapted"}, {"name": "mixed", "mixer": "mma"}],
            },
        }
        self.change({})
        for line in self.lines:
            (folder / line["path"]).touch()
        announced = self.snakemake("--cores", "1", "--dry-run", *self.targets).splitlines()
        for kind, _, paths in (line.strip().partition(": ") for line in announced):
            for path in paths.split(", ") if kind in ("output", "benchmark") else ():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_text('{"line": ""}')
        self.snakemake("--cores", "1", "--touch", "--forceall", *self.targets)

    targets = ("qc", "evaluate", "biomarkers")

    def change(self, cells: dict[str, str]) -> None:
        """Write the sheet, with other cells in the line of the last slide."""
        write_sheet(self.folder / "slides.tsv", [*self.lines[:-1], self.lines[-1] | cells])


def test_a_label_reruns_the_heads_of_its_target_alone_and_other_columns_what_depends_on_them(tmp_path: Path) -> None:
    project = Touched(tmp_path)
    (tmp_path / "results" / "biomarkers" / "her2" / "plain.parquet").unlink()
    project.change({"grade": "high", "note": "sent back"})  # nothing reads the note
    heads = {f"biomarkers_aggregator:{place}" for place in ("grade/plain", "grade/mixed", "her2/plain")}
    assert project.planned(*project.targets) == heads | {"biomarkers"}
    followers = {*heads, "biomarkers_aggregator:her2/mixed", "cohort", "embed_encoder:colour", "adapt_encoder:head"}
    followers |= {"mix_regions:mma", "evaluate_encoder:colour"}
    for cells, more in (({"split": "val"}, {"sample"}), ({"patient_id": "P9", "mpp": "0.5"}, {"tile_slide:S2"})):
        project.change(cells)
        assert more | followers <= project.planned(*project.targets), cells
