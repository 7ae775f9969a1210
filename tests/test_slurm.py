"""The workflow on a real Slurm: `make test-slurm`. Trainings are requeued, pre-empted and cancelled, and go on where they were.

Needs Debian's `slurm-wlm` and `munge`, and root for the pretended GPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import slurm_cluster
import yaml

from mad.config.base import merge

ROOT = Path(__file__).parents[1]
MISSING = slurm_cluster.missing_programs()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a pretended GPU is a device file, which only root can make"),
]
STEPS = 60
STATUS_SECONDS = 4


class Box:
    """A folder with the workflow, a cut-down demo's configuration, and a cluster to run it on."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment, self.started = folder, environment, time.monotonic()
        for name in ("Snakefile", "workflow", "slurm", "envs"):
            (folder / name).symlink_to(ROOT / name)
        demo = yaml.safe_load((ROOT / "config.yaml").read_text())
        run = merge(
            demo["runs"][0],
            {
                "steps": STEPS,
                "batch": 8,
                "runtime": {"threads": 1, "checkpoint_steps": 1000, "checkpoint_minutes": 0.05},
            },
        )
        runs = [run, {**run, "name": "dinov2", "method": "dinov2"}]
        self.config = merge(
            demo,
            {
                "synthetic": {"patients": 3, "val_patients": 0, "test_patients": 1, "width": 3584, "height": 1792},
                "runs": runs,
                "sample": {"max_standalone": {"2.5x": 4, "10x": 20, "40x": 40}, "max_pairs": {"10x-40x": 6}},
                "encoders": [{"name": "mad", "spec": "run:mad"}, {"name": "colour", "spec": "colour"}],
                "evaluate": {"runs": 1, "bootstrap_resamples": 20, "segmentation_num_slides": 0},
            },
        )
        (folder / "config.yaml").write_text(yaml.safe_dump(self.config))

    def say(self, text: str) -> None:
        """A line of the transcript, which `pytest -s` shows."""
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)

    def slurm(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout.strip()

    def job(self, jobid: str) -> dict[str, str]:
        """What `scontrol show job` says, by key."""
        words = self.slurm("scontrol", "show", "job", "--oneliner", jobid).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def running(self, comment: str) -> str | None:
        """The id of the running job with this comment."""
        for line in self.slurm("squeue", "--noheader", "--states=RUNNING", "--format=%A %k").splitlines():
            jobid, _, found = line.partition(" ")
            if found.strip() == comment:
                return jobid
        return None

    def log(self, run: str) -> str:
        path = self.folder / "results" / "logs" / "train" / f"{run}.log"
        return path.read_text() if path.exists() else ""

    def news(self, run: str, known: list[str]) -> list[str]:
        """Lines of a run's log about stops and resumptions; Snakemake begins the log anew at each start of a job."""
        told = [
            line for line in self.log(run).splitlines() if "stopped by SIGTERM" in line or "resumes at step" in line
        ]
        return [line for line in told if line not in known]

    def steps(self, run: str) -> list[int]:
        """The steps recorded so far."""
        path = self.folder / "results" / "train" / run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        yield Box(tmp_path_factory.mktemp("project"), {**environment, "MPLBACKEND": "Agg"})


def until(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


def test_trainings_outlive_requeue_preemption_and_cancellation(box: Box) -> None:
    command = ["snakemake", "--profile", "slurm", "--cores", str(slurm_cluster.CPUS)]
    command += ["--slurm-init-seconds-before-status-checks", str(STATUS_SECONDS)]
    output = box.folder / "snakemake.log"
    harms = {"mad": ["requeue", "pre-empt"], "dinov2": ["cancel"]}
    done = {run: 0 for run in harms}
    jobs: dict[str, list[str]] = {run: [] for run in harms}
    said: dict[str, list[str]] = {run: [] for run in harms}
    with output.open("w") as file:
        workflow = subprocess.Popen(command, cwd=box.folder, env=box.environment, stdout=file, stderr=file)
    try:
        while workflow.poll() is None:
            assert time.monotonic() - box.started < 1200
            for run, ahead in harms.items():
                said[run] += (new := box.news(run, said[run]))
                for line in new:
                    box.say(line)
                jobid = box.running(f"rule_train_run_wildcards_{run}")
                if jobid and jobid not in jobs[run]:
                    jobs[run].append(jobid)
                    job = box.job(jobid)
                    box.say(f"job {jobid} trains {run}, {job['TresPerJob']} on {job['NumNodes']} node")
                    assert "gpu:1" in job["TresPerJob"] and job["NumNodes"] == "1"
                recovered = len(said[run]) == 2 * done[run]  # a line when it stops, one when it resumes
                if (
                    jobid
                    and recovered
                    and done[run] < len(ahead)
                    and len(box.steps(run)) >= STEPS // 10 * (1 + 2 * done[run])
                ):
                    harm(box, ahead[done[run]], jobid)
                    done[run] += 1
            time.sleep(0.2)
    finally:
        if workflow.poll() is None:
            workflow.send_signal(signal.SIGINT)  # cancels its jobs
            with suppress(subprocess.TimeoutExpired):
                workflow.wait(timeout=60)
            workflow.kill()
    box.say(f"snakemake left with {workflow.returncode}")
    assert workflow.returncode == 0, output.read_text()
    assert done == {"mad": 2, "dinov2": 1}
    assert len(jobs["mad"]) == 1 and box.job(jobs["mad"][0])["Restarts"] == "2"
    assert len(jobs["dinov2"]) == 2 and box.job(jobs["dinov2"][0])["JobState"] == "CANCELLED"
    for run, times in done.items():
        assert sum("stopped by SIGTERM at step" in line for line in said[run]) == times
        assert sum("resumes at step" in line for line in said[run]) == times
        assert box.steps(run) == list(range(STEPS)), "a step is missing or was done twice"
    assert len(list((box.folder / "results" / "report" / "tables").glob("*.md"))) >= 5
    again = subprocess.run([*command, "--dry-run"], cwd=box.folder, env=box.environment, capture_output=True, text=True)
    assert "Nothing to be done" in again.stdout + again.stderr


def harm(box: Box, how: str, jobid: str) -> None:
    """Stop a job in mid-training, as an administrator, somebody with more priority, or its owner would."""
    box.say(f"{how} {jobid}")
    if how == "requeue":
        box.slurm("scontrol", "requeue", jobid)
    elif how == "pre-empt":
        box.slurm("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    else:
        box.slurm("scancel", jobid)


def test_two_nodes_train_one_run_and_queue_themselves_again(box: Box) -> None:
    results = box.folder / "results"
    config = json.loads((results / "config.json").read_text())
    config["runs"].append(config["runs"][0] | {"name": "nodes"})
    path = box.folder / "nodes.json"
    path.write_text(json.dumps(config))
    recipe = ["--ntasks", "2", "--nodes", "1", "--ntasks-per-node", "2", "--output", str(box.folder / "nodes.log")]
    jobid = box.slurm(
        "sbatch",
        "--parsable",
        "--chdir",
        str(box.folder),
        *recipe,
        str(ROOT / "profiles/slurm/train.sbatch"),
        "nodes",
        str(path),
    )
    until(
        lambda: len(box.steps("nodes")) >= STEPS // 10 or "FAILED" in box.job(jobid)["JobState"],
        "the two processes train",
    )
    box.slurm("scancel", "--signal=TERM", jobid)  # as --signal=TERM@300 does when time is nearly over
    box.say(f"job {jobid}, two tasks: SIGTERM after {len(box.steps('nodes'))} steps")
    until(lambda: box.job(jobid)["Restarts"] == "1", "the job queued itself again")
    until(lambda: box.job(jobid)["JobState"] == "COMPLETED", "the job ended")
    box.say(f"job {jobid}: Restarts=1, {box.job(jobid)['JobState']}")
    log = (box.folder / "nodes.log").read_text()
    assert "stopped by SIGTERM" in log and "resumes at step" in log
    assert json.loads((results / "train" / "nodes" / "summary.json").read_text())["world_size"] == 2
    assert box.steps("nodes") == list(range(STEPS))
