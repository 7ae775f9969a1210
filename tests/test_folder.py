"""A run's folder: another finished run is archived, another one that was stopped midway stays and is told of."""

from pathlib import Path

import pytest

from mad.files import MadError, sha256_file, write_json
from mad.training.folder import SHOWN, finished_run, prepare_folder

RECIPE = {"run": {"lr": 1e-3, "head": {"prototypes": 8}}, "seed": 3}
SLIDES = {"S01": "a", "S02": "b"}


def identity(recipe: str = "r1", data: str = "d1") -> dict[str, str]:
    return {"recipe_digest": recipe, "data_digest": data, "init_sha256": "w"}


def begin(folder: Path, *, finished: bool, checkpoint: bool = True) -> None:
    """What a run of `identity()` leaves in its folder."""
    prepare_folder(folder, identity(), RECIPE, slides=SLIDES)
    (folder / "metrics.jsonl").write_text("{}\n")
    if checkpoint:
        (folder / "checkpoints" / "step_0000004.pt").write_bytes(b"weights")
    if finished:
        (folder / "encoder").mkdir()
        (folder / "encoder" / "model.safetensors").write_bytes(b"weights")
        sha256 = sha256_file(folder / "encoder" / "model.safetensors")
        write_json(folder / "encoder" / "provenance.json", {**identity(), "weights_sha256": sha256})


def content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHERS = {
    "recipe": (identity("r2"), {**RECIPE, "run": {**RECIPE["run"], "lr": 5e-4}}, SLIDES, r"run\.lr: 0\.001 -> 0\.0005"),
    "data": (identity(data="d2"), RECIPE, {"S01": "c", "S03": "e"},
             r'data_digest: "d1" -> "d2"; slides\.S01: "a" -> "c"; slides\.S02: "b" -> none; slides\.S03: none -> "e"'),
    "start": ({**identity(), "init_sha256": "v"}, RECIPE, SLIDES, 'init_sha256: "w" -> "v"'),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_a_run_stopped_midway_is_told_of_and_left_as_it_is(tmp_path: Path, what: str) -> None:
    asked, recipe, slides, words = OTHERS[what]
    begin(tmp_path / "tiny", finished=False)
    (tmp_path / "tiny" / "checkpoints" / ".step_0000005.x.pt").write_bytes(b"half")
    before = content(tmp_path)
    with pytest.raises(MadError, match=rf"step_0000004\.pt.*{words}.*Put that back.*checkpoints away"):
        prepare_folder(tmp_path / "tiny", asked, recipe, slides=slides)
    assert content(tmp_path) == before
    prepare_folder(tmp_path / "tiny", identity(), RECIPE, slides=SLIDES)  # put back: it resumes
    assert (tmp_path / "tiny" / "checkpoints" / "step_0000004.pt").exists() and not (
        tmp_path / "tiny" / "archive"
    ).exists()


@pytest.mark.parametrize("way_out", ["finished", "no checkpoint yet", "checkpoints moved away"])
def test_another_run_begins_anew_where_none_is_lost(tmp_path: Path, way_out: str) -> None:
    folder = tmp_path / "tiny"
    begin(folder, finished=way_out == "finished", checkpoint=way_out != "no checkpoint yet")
    if way_out == "checkpoints moved away":
        (folder / "checkpoints").rename(tmp_path / "kept")
    asked, recipe, slides, _ = OTHERS["recipe"]
    prepare_folder(folder, asked, recipe, slides=slides)
    archive = folder / "archive" / "r1-d1"
    assert (archive / "metrics.jsonl").exists() and not (folder / "metrics.jsonl").exists()
    assert not list((folder / "checkpoints").iterdir()) and finished_run(folder, asked) is None
    kept = {"finished": archive / "checkpoints", "checkpoints moved away": tmp_path / "kept"}
    assert way_out not in kept or (kept[way_out] / "step_0000004.pt").exists()


def test_a_few_differences_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    begin(tmp_path / "tiny", finished=False)
    with pytest.raises(MadError, match=rf"and {42 - SHOWN} more\."):
        prepare_folder(tmp_path / "tiny", identity("r2"), {**RECIPE, **{f"k{n}": n for n in range(41)}}, slides=SLIDES)


def test_checkpoints_that_nothing_names_are_left(tmp_path: Path) -> None:
    begin(tmp_path / "tiny", finished=False)
    (tmp_path / "tiny" / "identity.json").unlink()
    with pytest.raises(MadError, match=r"identity\.json is missing"):
        prepare_folder(tmp_path / "tiny", identity(), RECIPE)
