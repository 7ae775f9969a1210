"""The command `mad`: what each command is asked, says and returns; faults are one message and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import pandas as pd
import pytest
from pipeline import configure, run_all
from typer.testing import CliRunner

from mad.cli import app
from mad.config import Config
from mad.files import MadError, write_json


@pytest.fixture
def config(slides: Path, tmp_path: Path) -> Config:
    config = configure(tmp_path, slides, sample={"max_pairs": {"10x-40x": 1}, "max_standalone": {"40x": 1}})
    write_json(tmp_path / "config.json", config.model_dump(mode="json"))
    return config


@pytest.fixture
def results(config: Config) -> Path:
    return run_all(config)


def mad(folder: Path, *arguments: str) -> tuple[int, str]:
    run = CliRunner().invoke(app, [*arguments, "--config", str(folder / "config.json")])
    if isinstance(run.exception, MadError):
        raise run.exception
    assert run.exception is None or isinstance(run.exception, SystemExit), run.exception
    return run.exit_code, run.stdout


def test_help_is_quick_and_loads_no_torch() -> None:
    code = "import sys; from mad.cli import app; assert not {'torch', 'timm', 'pandas', 'h5py'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = CliRunner().invoke(app, ["--help"]).stdout
    stages = ("cohort", "tile", "sample", "shard", "train", "embed", "evaluate", "report")
    for command in (*stages, "inspect", "doctor", "plan", "export", "config", "tiles", "shards"):
        assert f"│ {command} " in shown


@pytest.mark.parametrize("command", ["plan", "export", "shards verify", "tiles show", "inspect", "doctor", "tile"])
def test_each_command_explains_its_options(command: str) -> None:
    run = CliRunner().invoke(app, [*command.split(), "--help"])
    assert run.exit_code == 0 and "--config" in run.stdout


def test_a_fault_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mad", "plan", "--config", str(tmp_path / "none.yaml")], capture_output=True, text=True
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == f"mad: {tmp_path}/none.yaml: no such configuration file\n"


def test_waiting_threads_sleep() -> None:
    """Spinning ones take the time of those that they wait for."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    run = subprocess.run(
        [sys.executable, "-m", "mad", "doctor"],
        env=environment | {"OMP_DISPLAY_ENV": "TRUE"}, capture_output=True, text=True,
    )  # fmt: skip
    told = [line.split("=")[1].strip() for line in run.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
    if not told:
        pytest.skip("this OpenMP tells nothing of its settings")
    assert set(told) == {"'PASSIVE'"}


def test_the_limit_of_open_files_is_raised() -> None:
    """A memory-mapped slide is an open file, and a shell's limit of 1,024 is soon reached."""
    code = (
        "import resource, sys; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "from mad.cli import main\n"
        "sys.argv = ['mad', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]\n"
        "assert soft == (65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)), soft\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_an_unknown_slide_is_told_with_the_nearest(config: Config, tmp_path: Path) -> None:
    for command in (["tile", "S03"], ["shards", "verify", "S03"], ["export", "S03"]):
        with pytest.raises(MadError, match="no slide 'S03'; did you mean 'S0"):
            mad(tmp_path, *command)
    with pytest.raises(MadError, match="no slide 'xyz'; it has S01, S02"):
        mad(tmp_path, "export", "xyz")


def test_plan_prints_a_table_or_json(config: Config, tmp_path: Path) -> None:
    code, text = mad(tmp_path, "plan", "--quick")
    assert code == 0 and "S01" in text and "2 slides" in text
    code, text = mad(tmp_path, "plan", "--json")
    assert code == 0 and json.loads(text)["totals"]["magnifications"]["40x"]["tiles"] == 512


def test_verify_tells_faults_and_the_command_that_mends_them(results: Path, tmp_path: Path) -> None:
    assert mad(tmp_path, "shards", "verify") == (0, "")
    row = pd.read_parquet(results / "shard" / "S02.parquet").iloc[0]
    tar = results / "shard" / row["shard"]
    whole = tar.read_bytes()
    tar.write_bytes(whole[: row["offset"]] + bytes(8) + whole[row["offset"] + 8 :])
    assert mad(tmp_path, "shards", "verify", "S01") == (0, "")
    code, text = mad(tmp_path, "shards", "verify")
    fault, mend = text.splitlines()
    assert code == 1 and fault == f"{row['shard']}: {row['tile_id']}: its bytes are not those of its SHA-256"
    assert f"--force {results}/shard/S02.parquet" in mend and "S01" not in mend
    tar.write_bytes(b"")
    code, text = mad(tmp_path, "shards", "verify")
    assert code == 1 and "more faults" in text and len(text.splitlines()) == 22
    assert mad(tmp_path, "shard", "S02")[0] == 0  # what that command runs
    assert tar.read_bytes() == whole and mad(tmp_path, "shards", "verify") == (0, "")


def test_export_writes_the_embeddings_of_an_encoder(results: Path, tmp_path: Path, config: Config) -> None:
    entries = [{"name": "mine", "spec": "colour"}]
    write_json(tmp_path / "config.json", config.model_dump(mode="json") | {"encoders": entries})
    with pytest.raises(MadError, match="no entry named 'his'"):
        mad(tmp_path, "export", "--encoder", "his")
    with pytest.raises(MadError, match="TRIDENT's files alone"):
        mad(tmp_path, "export", "--encoder", "mine", "--format", "clam")
    assert mad(tmp_path, "embed", "mine")[0] == 0
    assert mad(tmp_path, "export", "--encoder", "mine", "-m", "10", "--status", "ok", "--status", "blank")[0] == 0
    out = results / "export" / "trident" / "10x_112px_0px_overlap" / "features_mine"
    assert sorted(path.name for path in out.iterdir()) == ["S01.h5", "S02.h5"]
    rows = pd.read_parquet(results / "embed" / "mine" / "S02.parquet")
    with h5py.File(out / "S02.h5") as file:
        wanted = [name for name in rows["tile_id"] if "_L1_" in name]
        assert sorted(name.decode() for name in file["tile_id"]) == sorted(wanted)
        assert file["features"].shape == (len(wanted), 6)


def test_export_writes_each_magnification(results: Path, tmp_path: Path) -> None:
    assert mad(tmp_path, "export", "--format", "clam")[0] == 0
    written = sorted(path.relative_to(results / "export" / "clam") for path in (results / "export").rglob("*.h5"))
    assert [str(path) for path in written] == [
        f"{m}x_112px_0px_overlap/patches/{slide}.h5" for m in ("10", "2.5", "40") for slide in ("S01", "S02")
    ]
    out = tmp_path / "out"
    chosen = ["--magnification", "10", "--label", "Gray Matter", "--status", "ok", "--output", str(out)]
    mad(tmp_path, "export", "S01", "--format", "trident", *chosen)
    (path,) = out.rglob("*.h5")
    table = pd.read_parquet(results / "tile" / "S01.parquet")
    table = table[(table["magnification"] == 10) & (table["status"] == "ok") & (table["label"] == "Gray Matter")]
    with h5py.File(path) as file:
        assert file["coords"][:].tolist() == table[["x", "y"]].to_numpy().tolist()
        assert [name.decode() for name in file["tile_id"]] == table["tile_id"].tolist()
    with pytest.raises(MadError, match="'Grey Matter' is no class"):
        mad(tmp_path, "export", "--label", "Grey Matter")
    with pytest.raises(MadError, match="name an --encoder"):
        mad(tmp_path, "export", "--dense")
    with pytest.raises(MadError, match="no slide was tiled at 20x"):
        mad(tmp_path, "export", "-m", "20")
