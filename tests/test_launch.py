"""The launcher of several training processes: they stop in order whoever gets the signal, and its exit code is theirs."""

import os
import signal
import subprocess
import sys
import time

import fakes
import pytest

from mad.files import MadError, read_json, write_json
from mad.training import launch
from mad.training.records import read_metrics

PROGRAM = "import sys; from mad.training.launch import Layout, launch; sys.exit(launch(Layout(2), ['-c', {work!r}], 4))"


def test_a_stopped_training_saves_leaves_with_75_and_resumes(tmp_path):
    """Stopped as Slurm does, which signals every process of a job."""
    fakes.write_cohort(tmp_path)
    entry = fakes.tiny_run(steps=30)
    entry["runtime"] |= {"processes": 2}
    path = tmp_path / "config.json"
    write_json(path, fakes.tiny_config(tmp_path, entry).model_dump(mode="json"))
    command = [sys.executable, "-m", "mad", "train", "tiny", "--config", str(path)]
    metrics = tmp_path / "train" / "tiny" / "metrics.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 5):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == launch.EXIT_RETRY, errors
    assert 5 <= len(read_metrics(metrics)) < 30
    resumed = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=600)
    assert resumed.returncode == 0 and "resumes at step" in resumed.stderr, resumed.stderr
    assert [record["step"] for record in read_metrics(metrics)] == list(range(30))
    assert read_json(metrics.parent / "summary.json")["world_size"] == 2


def test_a_signal_to_the_launcher_alone_reaches_its_processes(tmp_path):
    ready = [tmp_path / rank for rank in "01"]
    work = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).touch()\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(work=work)])
    while process.poll() is None and not all(path.exists() for path in ready):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == launch.EXIT_RETRY


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_a_failure_keeps_its_own_code(ends, code):
    """One process fails, the other would stay."""
    work = f"import os, sys, time\nif os.environ['RANK'] == '1': {ends}\ntime.sleep(60)"
    assert subprocess.run([sys.executable, "-c", PROGRAM.format(work=work)], timeout=600).returncode == code


def test_what_cannot_be_launched_is_said(monkeypatch):
    with pytest.raises(MadError, match="add --rendezvous HOST:PORT"):
        launch.launch(launch.Layout(1, nodes=2), [], threads=1)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MadError, match="4 processes need a GPU each; this machine grants 2"):
        launch.launch(launch.Layout(4), [], threads=1)
