"""What a run leaves behind when it is killed, or when the disk is full: nothing half-written, and a rerun completes it."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import heed_permissions
from pipeline import configure, run_all

from mad.config import Config
from mad.files import read_json, write_json
from mad.slides.sheet import cohort_rows
from mad.stages import shard


@pytest.fixture(scope="module")
def unbroken(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run up to the shards, with many small tars."""
    config = configure(tmp_path_factory.mktemp("unbroken"), slides, shard={"max_bytes": 1_000_000})
    run_all(config)
    return config


def copy_of_selection(unbroken: Config, folder: Path) -> Config:
    """The same run before stage `shard`, in another folder."""
    config = unbroken.model_copy(update={"results": str(folder / "results")})
    (folder / "results").mkdir()
    for stage in ("tile", "sample"):
        (folder / "results" / stage).symlink_to(Path(unbroken.results) / stage)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    return config


def start(config: Config, stage: str, slide: str, **options: object) -> subprocess.Popen[str]:
    settings = Path(config.results).parent / "config.json"
    command = [sys.executable, "-m", "mad", stage, slide, "--config", str(settings)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


def files(config: Config) -> dict[str, bytes]:
    """Every file of stage `shard` and its content."""
    folder = Path(config.results) / "shard"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_whole(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Whatever bears a final name is what an unbroken run writes, byte for byte."""
    for name, data in found.items():
        if not Path(name).name.startswith(".") and name != "S01/index.json":
            assert data == expected[name], name


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_any_moment_nothing_half_written_bears_a_final_name(
    unbroken: Config, tmp_path: Path, how: signal.Signals
) -> None:
    expected = {name: data for name, data in files(unbroken).items() if name.startswith("S01")}
    assert len(expected) > 6
    config = copy_of_selection(unbroken, tmp_path)
    begin = time.perf_counter()
    start(config, "shard", "S01").communicate()
    seconds = time.perf_counter() - begin
    shutil.rmtree(Path(config.results) / "shard")
    moments, killed = random.Random(int(how)), 0
    for _ in range(6):
        process = start(config, "shard", "S01")
        time.sleep(seconds * moments.uniform(0.5, 1))
        process.send_signal(how)
        process.communicate()
        killed += process.returncode != 0
        found = files(config)
        check_whole(found, expected)
        if how == signal.SIGTERM:
            assert not [name for name in found if Path(name).name.startswith(".")]
        if not process.returncode:  # done before: the machine was slower when it was timed
            seconds *= 0.7
            shutil.rmtree(Path(config.results) / "shard")
    assert killed
    shard.run(config, cohort_rows(config)[0])
    found = {name: data for name, data in files(config).items() if name.startswith("S01")}
    assert set(found) == set(expected)
    check_whole(found, expected)


@pytest.mark.parametrize(("stage", "limit"), [("shard", 400_000), ("tile", 20_000)])
def test_a_full_disk_is_named_and_leaves_what_was_finished(
    unbroken: Config, tmp_path: Path, stage: str, limit: int
) -> None:
    """A limit on the size of files stands for the full disk: the same OSError from the same call."""
    config = copy_of_selection(unbroken, tmp_path)
    if stage == "tile":
        (tmp_path / "results" / "tile").unlink()

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(config, stage, "S01", preexec_fn=small_files)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "S01" in errors and ("cannot be written (File too large" in errors or "is the disk full?" in errors)
    assert not [path for path in (tmp_path / "results" / stage).rglob("S01.*") if path.is_file()]
    again = start(config, stage, "S01")
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    name = f"{stage}/S01.parquet"
    assert (tmp_path / "results" / name).read_bytes() == (Path(unbroken.results) / name).read_bytes()


def test_a_folder_that_cannot_be_written_is_named(unbroken: Config, tmp_path: Path) -> None:
    config = copy_of_selection(unbroken, tmp_path)
    (tmp_path / "results" / "shard").write_text("a file where the folder should be")
    process = start(config, "shard", "S01")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "cannot be written" in errors and "`results`" in errors


def test_a_slide_in_a_folder_that_may_not_be_entered_is_quarantined(
    unbroken: Config, slides: Path, tmp_path: Path
) -> None:
    shutil.copytree(slides, tmp_path / "locked")
    config = configure(tmp_path, tmp_path / "locked")
    shutil.copytree(Path(unbroken.results) / "sample", tmp_path / "results" / "sample")
    write_json(tmp_path / "config.json", config.model_dump(mode="json"))
    (tmp_path / "locked").chmod(0)
    try:
        for stage in ("tile", "shard"):
            process = start(config, stage, "S01", preexec_fn=heed_permissions)
            _, errors = process.communicate()
            assert process.returncode == 0 and "Permission denied" in errors and "Traceback" not in errors, errors
    finally:
        (tmp_path / "locked").chmod(0o755)
    facts = read_json(tmp_path / "results" / "tile" / "S01.json")
    assert facts["status"] == "failed" and "mend its permissions" in facts["cause"]
    lost = pd.read_parquet(tmp_path / "results" / "shard" / "S01.parquet")
    assert len(lost) and (lost["status"] == "unreadable").all()
