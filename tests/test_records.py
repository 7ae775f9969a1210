"""What a training tells: one record per step whatever is pending, warnings when they come and go, TensorBoard on request."""

import json

import fakes
import pytest
import torch

from mad.config.training import RunConfig
from mad.files import MadError, StorageError
from mad.stages import train
from mad.training import records as module
from mad.training.records import FETCH_STEPS, Records, read_metrics, require_tensorboard, trim_metrics

LOSSES = ["total", "dino", "ibot", "spread"]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
WELL = {"rankme": 40.0, "scale_separation": 1.0, "retrieval_at_1": 0.5, "pairs": 80}


def tiny(**runtime):
    entry = fakes.tiny_run(steps=100, warmup=1)
    return RunConfig(**entry | {"runtime": entry["runtime"] | {"health_every": 5, "log_seconds": 1000} | runtime})


def fill(records, steps, health=None, dino=2.0, images=12):
    for step in steps:
        values = torch.tensor([dino + step, dino, 0.5, 0.25])
        facts = {"lr": 1e-3, "grad_norm": 1.5, "kinds": "pair", "data_wait_s": 0.25, "images": images, "seconds": 0.5}
        records.add(LOSSES, values, step=step, health=health, **facts)


def test_a_record_holds_what_was_told(tmp_path):
    records = Records(tiny(), tmp_path, 0, CPU)
    fill(records, range(2))
    fill(records, [2], health=WELL)
    records.close()
    first, _, last = read_metrics(tmp_path / "metrics.jsonl")
    assert first == {
        "step": 0, "loss": 2.0, "dino": 2.0, "ibot": 0.5, "spread": 0.25, "dino_of_ln_k": pytest.approx(2 / 3.17805, rel=1e-5),
        "lr": 1e-3, "grad_norm": 1.5, "kinds": "pair", "data_wait_s": 0.25, "images_per_s": 24.0,
    }  # fmt: skip
    assert (last["step"], last["loss"], last["health"], last["warnings"]) == (2, 4.0, WELL, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"], "nothing else is written unasked"


def test_losses_of_a_gpu_are_fetched_together_and_none_is_lost(tmp_path):
    """The device only tells how often to fetch: the losses here are on the CPU."""
    path = tmp_path / "metrics.jsonl"
    records = Records(tiny(), tmp_path, 0, GPU)
    fill(records, range(FETCH_STEPS - 1))
    assert not path.exists()
    fill(records, [FETCH_STEPS - 1])
    assert len(read_metrics(path)) == FETCH_STEPS
    fill(records, [20, 21])
    records.flush()  # a checkpoint is due
    assert len(read_metrics(path)) == 22
    fill(records, [22], health=WELL)
    assert len(read_metrics(path)) == 23
    fill(records, [23, 24])
    records.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [(n, 2.0 + n) for n in range(25)]


def test_progress_tells_loss_rate_and_waiting(tmp_path, capsys):
    records = Records(tiny(log_seconds=0), tmp_path, 40, GPU)
    fill(records, [40])
    line = capsys.readouterr().err
    assert "tiny: step 41/100 loss 42.000 (0.629 of ln K) 24 images/s, 50% waiting for data, " in line
    fill(records, [41], images=36)
    assert " 48 images/s" in capsys.readouterr().err  # 48 images in one second: the mean of recent steps
    records.close()


def test_a_warning_is_told_when_it_comes_and_when_it_goes(tmp_path, capsys):
    records = Records(tiny(), tmp_path, 0, CPU)
    collapsed = WELL | {"rankme": 2.0}
    for step, health in enumerate([WELL, collapsed, collapsed, WELL, collapsed]):
        fill(records, [step], health=health)
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 3
    assert lines[0].startswith("tiny: WARNING: step 2: rank collapse: RankMe is 2.0")
    assert lines[1] == "tiny: step 4: rank collapse is over"
    assert lines[2].startswith("tiny: WARNING: step 5: rank collapse")
    records.close()
    told = [record["warnings"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert told == [[], ["rank collapse"], ["rank collapse"], [], ["rank collapse"]]
    resumed = Records(tiny(), tmp_path, 5, CPU)
    fill(resumed, [5], health=collapsed)
    assert not capsys.readouterr().err, "told before the run was stopped"
    fill(resumed, [6], health=WELL)
    assert "step 7: rank collapse is over" in capsys.readouterr().err
    resumed.close()


def test_a_resumed_run_judges_by_the_same_recent_losses(tmp_path):
    """Losses below ln K before the stop, one at ln K after it: the mean over the last three steps is not at ln K."""
    at_ln_k = 3.178
    for folder, stops in ((tmp_path / "unbroken", []), (tmp_path / "resumed", [4])):
        folder.mkdir()
        records = Records(tiny(), folder, 0, CPU)
        for step in range(10):
            if step in stops:
                records.close()
                records = Records(tiny(), folder, step, CPU)
            fill(records, [step], dino=1.0 if step < 4 else at_ln_k, health=WELL if step in (4, 9) else None)
        records.close()
    unbroken, resumed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("unbroken", "resumed"))
    assert unbroken == resumed
    assert [record["warnings"] for record in resumed if "warnings" in record] == [[], ["uniform collapse"]]


def test_warm_up_is_given_time(tmp_path, capsys, monkeypatch):
    for warmup, grace, expected in ((50, 1000, 0), (50, 10, 1), (5, 1000, 1)):
        monkeypatch.setattr(module, "GRACE_STEPS", grace)
        records = Records(tiny().model_copy(update={"warmup": warmup}), tmp_path, 0, CPU)
        fill(records, [20], dino=3.178, health=WELL)
        records.close()
        assert capsys.readouterr().err.count("uniform collapse") == expected


def test_what_is_left_is_written_on_the_way_out_and_a_full_disk_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    records = Records(tiny(), tmp_path, 0, GPU)
    fill(records, range(3))
    with pytest.raises(StorageError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        records.flush()
    records.close()  # what failed is not written again, perhaps behind half a line


def test_metrics_are_trimmed_to_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)) + '{"step": 5, "lo')
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in trim_metrics(path, 3)] == [0, 1, 2]
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_every_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard", reason="an extra: pip install tensorboard")
    killed = Records(tiny(tensorboard=True), tmp_path, 0, CPU)
    fill(killed, range(8))
    killed.flush()  # no `close`: steps 5 to 7 came after the checkpoint that the next start resumes from
    trim_metrics(tmp_path / "metrics.jsonl", 5)
    resumed = Records(tiny(tensorboard=True), tmp_path, 5, CPU)
    fill(resumed, range(5, 9), dino=3.0)
    fill(resumed, [9], health=WELL | {"knn_coarse_to_fine": None}, dino=3.0)
    resumed.close()
    expected = [(step, 2.0 if step < 5 else 3.0) for step in range(10)]
    assert scalars(tmp_path / "tensorboard", "dino") == expected
    assert scalars(tmp_path / "tensorboard", "health/rankme") == [(9, 40.0)]
    assert [(record["step"], record["dino"]) for record in read_metrics(tmp_path / "metrics.jsonl")] == expected


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # its thread tells what has ended it
@pytest.mark.parametrize("fault", ["full", "no folder"])
def test_a_run_goes_on_where_tensorboard_cannot_write(tmp_path, capsys, fault):
    pytest.importorskip("tensorboard", reason="an extra: pip install tensorboard")
    folder = tmp_path / "tensorboard"
    if fault == "no folder":
        folder.touch()
    records = Records(tiny(tensorboard=True), tmp_path, 0, CPU)
    if fault == "full":
        (events,) = folder.iterdir()
        events.unlink()
        events.symlink_to("/dev/full")
    for step in range(0, 9, 3):
        fill(records, range(step, step + 3))
        records.flush()
    records.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 9
    told = capsys.readouterr().err
    assert told.count("tensorboard: cannot be written (") == told.count("goes on without TensorBoard") == 1


def test_a_missing_tensorboard_is_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else 1 / 0)
    require_tensorboard(tiny())
    entry = fakes.tiny_run()
    config = fakes.tiny_config(tmp_path, entry | {"runtime": entry["runtime"] | {"tensorboard": True}})
    with pytest.raises(MadError, match=r"runs.tiny.runtime.tensorboard: .*pip install tensorboard"):
        train.run(config, "tiny")
    assert not (tmp_path / "train").exists()
