"""Stage `train`: killed and resumed runs, other recipes, many processes, non-finite losses, the summary."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import fakes
import psutil
import pytest
import timm
import torch
from safetensors.torch import load_file

from mad.config.recipe import freeze_recipe
from mad.config.training import RunConfig
from mad.files import MadError, StorageError, read_json, sha256_file, write_json
from mad.stages import train
from mad.training import loop
from mad.training import method as methods
from mad.training.data import TrainingSet, batches
from mad.training.health import choose_health_set
from mad.training.index import load_index
from mad.training.loss_names import loss_names
from mad.training.method import SelfDistillation
from mad.training.objective import Numerics, step_loss
from mad.training.optimiser import build_optimiser
from mad.training.records import append_lines

STANDARDISED = {"hidden": 32, "bottleneck": 16, "prototypes": 24, "standardise": True}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    fakes.write_cohort(folder)
    return folder


@pytest.fixture
def fresh(results, tmp_path):
    """A results folder of its own that shares the shards."""
    (tmp_path / "shard").symlink_to(results / "shard")
    return tmp_path


def run(config, name="tiny"):
    train.run(config, name)
    return Path(config.results) / "train" / name


def weights(folder):
    return (folder / "encoder" / "model.safetensors").read_bytes()


def start(config, *launcher, preexec_fn=None, **environment):
    """`python -m mad train tiny`, or the same behind a launcher, as a process of its own."""
    path = Path(config.results) / "config.json"
    write_json(path, config.model_dump(mode="json"))
    command = [sys.executable, *launcher, "-m", "mad", "train", "tiny", "--config", str(path)]
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, preexec_fn=preexec_fn)


@pytest.fixture(scope="module")
def unbroken(results, tmp_path_factory):
    """A run of 80 steps that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "shard").symlink_to(results / "shard")
    return run(fakes.tiny_config(folder, fakes.tiny_run(steps=80, head=STANDARDISED)))


def heed_ctrl_c():
    """A shell's background jobs, and what they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_and_resumed_run_ends_bit_equal(fresh, unbroken, how):
    config = fakes.tiny_config(fresh, fakes.tiny_run(steps=80, head=STANDARDISED))
    metrics = fresh / "train" / "tiny" / "metrics.jsonl"
    process = start(config, preexec_fn=heed_ctrl_c)
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 10):
        time.sleep(0.002)
    process.send_signal(how)
    process.communicate()
    assert process.returncode == (-how if how == signal.SIGKILL else train.EXIT_RETRY)
    steps_done = len(train.read_metrics(metrics))
    assert 10 <= steps_done < 80
    assert not (fresh / "train" / "tiny" / "summary.json").exists()
    folder = run(config)
    assert weights(folder) == weights(unbroken)
    records = [train.read_metrics(path / "metrics.jsonl") for path in (folder, unbroken)]
    assert [record["step"] for record in records[0]] == list(range(80))
    assert [record["loss"] for record in records[0]] == [record["loss"] for record in records[1]]
    assert [record.get("health") for record in records[0]] == [record.get("health") for record in records[1]]


def test_a_run_is_trained_by_one_process_at_a_time(fresh, unbroken):
    """The second start is refused and touches nothing; once the first is dead, whatever becomes of what it forked, it goes on."""
    entry = fakes.tiny_run(steps=80, head=STANDARDISED)
    entry["runtime"] |= {"workers": 1}
    config = fakes.tiny_config(fresh, entry)
    folder = fresh / "train" / "tiny"
    process = start(config)
    while process.poll() is None and not list((folder / "checkpoints").glob("step_*.pt")):
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    loading = psutil.Process(process.pid).children()
    for child in loading:
        child.suspend()
    before = snapshot(folder)
    with pytest.raises(MadError, match=rf"tiny: process {process.pid} on .* is training this run; wait until"):
        run(config)
    assert snapshot(folder) == before
    process.kill()
    process.wait()
    assert loading and all(child.is_running() for child in loading)
    try:
        assert weights(run(config)) == weights(unbroken)
    finally:
        for child in loading:
            child.kill()


def test_a_folder_that_cannot_be_locked_is_told_of(fresh, monkeypatch, capsys):
    def unlockable(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unlockable)
    folder = run(fakes.tiny_config(fresh, fakes.tiny_run(steps=3)))
    assert "tiny/.lock: cannot be locked (No locks available)" in capsys.readouterr().err
    assert (folder / "summary.json").exists()


def kill_self(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_pass(number):
    """SIGKILL before the `number`-th forward pass of training: with two passes per step every second one is mid-step."""
    original, calls = loop.accumulate, iter(range(10**6))

    def accumulate(model, state, loader, passes, teach_all, loss_of):
        def counted(*given):
            if next(calls) == number:
                kill_self()
            return loss_of(*given)

        return original(model, state, loader, passes, teach_all, counted)

    loop.accumulate = accumulate


def die_while_saving(number):
    """SIGKILL when half of the `number`-th checkpoint is on disk."""
    original, calls = torch.save, iter(range(10**6))

    def save(state, path):
        original(state, path)
        if next(calls) == number:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            kill_self()

    loop.checkpoint.torch.save = save


def run_until_killed(config, die, number):
    """Train in a forked process that `die` kills; a process of its own would spend its seconds on imports."""
    process = os.fork()
    if process == 0:
        try:
            die(number)
            run(config)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_moments_ends_bit_equal(fresh, results, tmp_path_factory, seed):
    """Mid-step between two accumulated passes, between steps, and in the middle of a save."""
    entry = fakes.tiny_run(steps=24)
    entry["backbone"]["args"]["drop_path_rate"] = 0.2
    entry["runtime"] |= {"micro_batch": 2, "checkpoint_steps": 3}
    whole = tmp_path_factory.mktemp("whole")
    (whole / "shard").symlink_to(results / "shard")
    unbroken = run(fakes.tiny_config(whole, entry))
    config, random = fakes.tiny_config(fresh, entry), Random(seed)
    run_until_killed(config, die_before_pass, 2 * random.randrange(1, 8) + 1)
    run_until_killed(config, die_while_saving, random.randrange(1, 3))
    assert list((fresh / "train" / "tiny" / "checkpoints").glob(".step_*.pt"))  # the half that the kill left
    run_until_killed(config, die_before_pass, random.randrange(1, 12))
    assert len(train.read_metrics(fresh / "train" / "tiny" / "metrics.jsonl")) < 24
    folder = run(config)
    assert weights(folder) == weights(unbroken)
    losses = [[record["loss"] for record in train.read_metrics(path / "metrics.jsonl")] for path in (folder, unbroken)]
    assert len(losses[0]) == 24 and losses[0] == losses[1]


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_resumes(fresh, results, unbroken):
    """A limit on the size of files stands for the full disk: the same OSError from the same call."""
    config = fakes.tiny_config(fresh, fakes.tiny_run(steps=80, head=STANDARDISED))
    run_until_killed(config, die_before_pass, 30)
    checkpoints = fresh / "train" / "tiny" / "checkpoints"
    before = snapshot(checkpoints)
    assert before

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start(config, preexec_fn=small_files)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert b"cannot be written" in errors and b"resumes from the checkpoint before" in errors
    assert b"Traceback" not in errors
    assert snapshot(checkpoints) == before
    assert weights(run(config)) == weights(unbroken)


def test_a_full_disk_is_named_where_metrics_are_written(tmp_path):
    with pytest.raises(StorageError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        append_lines(tmp_path / "metrics.jsonl", ["{}"])


def test_torchrun_with_two_processes_agrees_with_one(fresh, results, tmp_path_factory):
    """Two passes per step, a backbone that waits, checkpointed activations; then one process takes over the work of two."""
    entry = fakes.tiny_run(steps=8, mix_mode="within", warmup=1, freeze_last_layer=0, freeze_backbone=2)
    entry["runtime"] |= {"micro_batch": 1, "activation_checkpointing": True}
    config = fakes.tiny_config(fresh, entry)
    process = start(config, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", OMP_NUM_THREADS="1")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()
    alone = tmp_path_factory.mktemp("alone")
    (alone / "shard").symlink_to(results / "shard")
    entry["runtime"] |= {"micro_batch": 2, "activation_checkpointing": False}  # as many samples per pass
    single = run(fakes.tiny_config(alone, entry))
    many = fresh / "train" / "tiny"
    first, second = (load_file(folder / "encoder" / "model.safetensors") for folder in (many, single))
    for name in second:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)
    assert read_json(many / "summary.json")["world_size"] == 2
    losses = [[record["loss"] for record in train.read_metrics(folder / "metrics.jsonl")] for folder in (many, single)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert "sees 2 samples at a time, not the 4" in (many / "encoder" / "README.md").read_text()
    (many / "encoder" / "provenance.json").unlink()
    (many / "checkpoints" / "step_0000008.pt").unlink()
    run(fakes.tiny_config(fresh, entry))
    resumed = [record["loss"] for record in train.read_metrics(many / "metrics.jsonl")]
    assert resumed[:4] == losses[0][:4] and resumed == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("method", ["mad", "dinov2"])
def test_a_run_writes_an_encoder_that_timm_loads_and_a_summary(fresh, method):
    folder = run(fakes.tiny_config(fresh, fakes.tiny_run(method=method)))
    summary = read_json(folder / "summary.json")
    assert summary["weights_sha256"] == sha256_file(folder / "encoder" / "model.safetensors")
    assert summary["recipe_digest"] and summary["data_digest"]
    assert summary["steps"] == 10
    assert summary["collapsed"] == any("collapse" in warning for warning in summary["warnings"])
    assert summary["health_split"] == "val"
    assert set(summary["final_loss_by_views"]) <= {"pair", "multicrop"} and summary["final_loss"] > 0
    assert 0 < summary["health"]["rankme"] <= 24
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "license: apache-2.0" in (folder / "encoder" / "README.md").read_text()
    teacher = torch.load(folder / "checkpoints" / "step_0000010.pt", weights_only=True)["teacher"]
    exported = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True).state_dict()
    assert all(torch.equal(teacher[f"backbone.{name}"], tensor) for name, tensor in exported.items())


def test_both_methods_start_from_the_same_standardised_networks(results):
    starts = []
    for method in ("mad", "dinov2"):
        state, data, _, numerics = parts(results, method=method)
        before = state.student.backbone.state_dict()["patch_embed.proj.weight"].clone()
        train.standardise_head(
            state.student, state.teacher, choose_health_set({"train": data.index}, fakes.TILE_PX, 16), numerics
        )
        assert torch.equal(before, state.student.backbone.state_dict()["patch_embed.proj.weight"])
        assert all(
            torch.equal(a, b)
            for a, b in zip(state.student.state_dict().values(), state.teacher.state_dict().values(), strict=True)
        )
        starts.append(state.student.state_dict())
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_a_finished_run_is_not_trained_again(fresh, monkeypatch):
    config = fakes.tiny_config(fresh)
    folder = run(config)
    before, stamp = weights(folder), read_json(folder / "summary.json")
    (folder / "summary.json").unlink()
    (folder / "encoder" / "model.safetensors").unlink()
    monkeypatch.setattr(methods, "step_loss", None)  # a step would fail
    run(config)
    assert weights(folder) == before
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    (folder / "summary.json").unlink()
    run(config)  # from the encoder alone
    assert read_json(folder / "summary.json") == stamp


@pytest.mark.parametrize("changed", [True, False])
def test_other_tiles_of_the_health_checks_are_told(fresh, capsys, changed):
    (fresh / "shard").unlink()
    fakes.write_cohort(fresh)
    config = fakes.tiny_config(fresh)
    run_until_killed(config, die_before_pass, 6)
    fakes.write_slide(fresh / "shard", "S03", "val", 8, 4, seed=5 if changed else 0)
    run(config)
    assert ("WARNING: its health checks look at other tiles from here" in capsys.readouterr().err) == changed


def test_lost_records_are_told_with_what_mends_them(fresh):
    config = fakes.tiny_config(fresh, fakes.tiny_run(steps=3))
    folder = run(config)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(MadError, match=r"metrics.jsonl: no records .* or remove \S+/encoder and \S+/checkpoints, and"):
        run(config)
    for name in ("encoder", "checkpoints"):
        shutil.rmtree(folder / name)
    run(config)
    assert len(train.read_metrics(folder / "metrics.jsonl")) == 3 and (folder / "summary.json").exists()


@pytest.mark.parametrize("what", ["recipe", "data"])
def test_another_recipe_or_other_data_archives_the_former_encoder(fresh, tmp_path_factory, capsys, what):
    folder = run(fakes.tiny_config(fresh))
    former, summary = weights(folder), read_json(folder / "summary.json")
    if what == "data":
        (fresh / "shard").unlink()
        fakes.write_cohort(fresh, pairs=9)
    run(fakes.tiny_config(fresh, fakes.tiny_run(lr=2e-3) if what == "recipe" else fakes.tiny_run()))
    archive = folder / "archive" / f"{summary['recipe_digest']}-{summary['data_digest']}"
    assert weights(archive) == former != weights(folder)
    assert (archive / "metrics.jsonl").exists() and list((archive / "checkpoints").glob("*.pt"))
    log = capsys.readouterr().err
    assert "moved to" in log
    assert ("run.lr: 0.001 -> 0.002" if what == "recipe" else "data_digest: ") in log


@pytest.mark.parametrize("what", ["recipe", "data"])
def test_a_run_stopped_midway_is_not_put_aside_for_another(fresh, what):
    folder = run(fakes.tiny_config(fresh))
    whole = weights(folder)
    for path in ("encoder/provenance.json", "summary.json", "checkpoints/step_0000010.pt"):  # killed at step 8 or 9
        (folder / path).unlink()
    before, shards = snapshot(folder), (fresh / "shard").readlink()
    other = fakes.tiny_run(lr=2e-3) if what == "recipe" else fakes.tiny_run()
    if what == "data":
        (fresh / "shard").unlink()
        fakes.write_slide(fresh / "shard", "S01", "train", 9, 4)
        for slide in ("S02", "S03"):
            for path in shards.glob(f"{slide}*"):
                (fresh / "shard" / path.name).symlink_to(path)
    words = {"recipe": r"run\.lr: 0\.001 -> 0\.002", "data": r'data_digest: .*slides\.S01: "\w+" -> "\w+"\. '}[what]
    with pytest.raises(MadError, match=rf"not finished \(step_0000008\.pt\).*{words}"):
        run(fakes.tiny_config(fresh, other))
    assert snapshot(folder) == before
    if what == "recipe":  # put back, with another setting that changes no result
        other["runtime"] |= {"log_seconds": 5}
        assert weights(run(fakes.tiny_config(fresh, other | {"lr": 1e-3}))) == whole
    else:
        (folder / "checkpoints").rename(fresh / "kept")
        run(fakes.tiny_config(fresh, other))
        assert weights(folder) != whole and list((folder / "archive").iterdir())


def snapshot(folder):
    """Bytes of every file below `folder`."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "fault",
    [
        "init",
        "samples",
        "batch",
        "pairs",
        "batch norm on two processes",
        "batch norm computed twice",
        "no patch embedding",
    ],
)
def test_a_run_that_cannot_start_leaves_the_former_one_where_it_is(fresh, tmp_path_factory, monkeypatch, fault):
    second = {"name": "second", "init": "run:tiny", "steps": 3, "head": STANDARDISED}
    config = fakes.tiny_config(fresh, fakes.tiny_run(steps=3), fakes.tiny_run(**second))
    first, folder = run(config), run(config, "second")
    before = snapshot(folder)
    if fault == "init":
        (first / "encoder").rename(first / "moved")
        message = "train the run"
    elif fault == "batch":
        config = fakes.tiny_config(fresh, fakes.tiny_run(), fakes.tiny_run(**second, lr=0.5, batch=5))
        monkeypatch.setattr(train.ranks, "world_size", lambda: 2)
        message = "multiple of 2"
    elif fault in ("batch norm on two processes", "batch norm computed twice", "no patch embedding"):
        changes = {"backbone": {"model": "test_efficientnet", "pooling": "avg"}, "init": "random"}
        if fault == "batch norm on two processes":
            monkeypatch.setattr(train.ranks, "world_size", lambda: 2)
            message = "statistics would differ from process to process"
        elif fault == "batch norm computed twice":
            changes["runtime"] = {"activation_checkpointing": True}
            message = "statistics would count twice"
        else:
            changes["patch_embed_lr"] = 0.2
            message = "no patch embedding"
        config = fakes.tiny_config(fresh, fakes.tiny_run(), fakes.tiny_run(**second | changes))
    else:
        (fresh / "shard").unlink()
        for slide in ("S01", "S02", "S03"):
            if fault == "samples" or slide == "S03":
                fakes.write_slide(fresh / "shard", slide, "val", 8, 4)
            else:
                fakes.write_slide(fresh / "shard", slide, "train", 0, 4)
        message = "no readable sample" if fault == "samples" else "no parent with as many readable children"
    with pytest.raises(MadError, match=message):
        run(config, "second")
    assert snapshot(folder) == before


def test_a_finished_run_keeps_the_machine_that_trained_it(fresh, monkeypatch):
    config = fakes.tiny_config(fresh, fakes.tiny_run(precision="auto"))
    folder = run(config)
    encoder, summary = snapshot(folder / "encoder"), read_json(folder / "summary.json")
    (folder / "summary.json").unlink()
    monkeypatch.setattr(train, "choose_dtype", lambda *_: torch.float16)
    monkeypatch.setattr(train.torch, "get_num_threads", lambda: 77)
    monkeypatch.setattr(train.checkpoint, "load_latest", None)  # nothing is loaded
    run(config)
    assert read_json(folder / "summary.json") == summary
    assert snapshot(folder / "encoder") == encoder


def test_a_run_is_not_resumed_in_another_precision(fresh, monkeypatch):
    config = fakes.tiny_config(fresh, fakes.tiny_run(precision="auto"))
    monkeypatch.setattr(train, "choose_dtype", lambda *_: torch.float32)
    folder = run(config)
    (folder / "encoder" / "provenance.json").unlink()  # killed before the export was whole
    (folder / "checkpoints" / "step_0000010.pt").unlink()
    before = snapshot(folder)
    monkeypatch.setattr(train, "choose_dtype", lambda *_: torch.bfloat16)
    with pytest.raises(MadError, match=r"runs\.tiny\.precision.*float32 up to step 8.*bfloat16"):
        run(config)
    assert snapshot(folder) == before
    monkeypatch.setattr(train, "choose_dtype", lambda *_: torch.float32)
    assert read_json(run(config) / "summary.json")["precision"] == "float32"


def test_a_start_removes_what_a_killed_save_left(fresh):
    folder = run(fakes.tiny_config(fresh))
    before = snapshot(folder / "checkpoints")
    (folder / "checkpoints" / ".step_0000009.k3x_9a.pt").write_bytes(b"half a checkpoint")
    (folder / "encoder" / "provenance.json").unlink()  # not finished: the run is taken up again
    run(fakes.tiny_config(fresh))
    assert len(before) == 2
    assert snapshot(folder / "checkpoints").keys() == before.keys()


def test_runtime_settings_do_not_change_the_recipe_but_all_others_do(tmp_path):
    def recipe(**changes):
        return freeze_recipe(fakes.tiny_config(tmp_path, fakes.tiny_run(**changes)), "tiny")

    assert recipe(runtime={"threads": 2, "workers": 3}) == recipe()
    assert recipe(seed=3) == recipe()  # the configuration's own seed
    for changes in ({"seed": 4}, {"lr": 0.5}, {"children": 3}, {"head": {"prototypes": 5}}, {"mix": {"standalone": 1}}):
        assert recipe(**changes) != recipe()
    assert json.loads(json.dumps(recipe())) == recipe()
    later = {"targets", "parent_weight"}  # keys that runs of before lack
    assert not later & recipe()["run"].keys() and recipe(targets="cell")["run"]["targets"] == "cell"
    assert recipe(method="mad_global", parent_weight=0.5)["run"]["parent_weight"] == 0.5
    with pytest.raises(MadError, match="tiny"):
        freeze_recipe(fakes.tiny_config(tmp_path), "other")


def test_a_run_can_start_from_another_and_remembers_its_weights(fresh):
    second = fakes.tiny_run(name="second", init="run:tiny", steps=3)
    config = fakes.tiny_config(fresh, fakes.tiny_run(), second)
    with pytest.raises(MadError, match="train the run"):
        run(config, "second")
    first = run(config)
    loaded = []
    original = loop.build_networks

    def spy(*arguments):
        loaded.append(original(*arguments))
        return loaded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_networks", spy)
        patch.setattr(train, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config, "second")
    start_weights = load_file(first / "encoder" / "model.safetensors")
    student = loaded[0][0].backbone.state_dict()
    assert all(torch.equal(student[name], tensor) for name, tensor in start_weights.items())
    summary = read_json(run(config, "second") / "summary.json")
    assert summary["init_sha256"] == sha256_file(first / "encoder" / "model.safetensors")


def parts(results, **changes):
    entry = RunConfig(**fakes.tiny_run(**changes))
    index = load_index(results / "shard", "train", entry.children)
    student, teacher = loop.build_networks(entry, fakes.TILE_PX, 0)
    state = loop.Run(student, teacher, build_optimiser(student, entry), {}, "float32", entry.batch)
    numerics = Numerics((0.5,) * 3, (0.5,) * 3, torch.device("cpu"), torch.float32)
    return (
        state,
        TrainingSet(index, entry, fakes.TILE_PX, 16, 0),
        choose_health_set({"train": index}, fakes.TILE_PX, 8),
        numerics,
    )


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_loss_or_gradient_stops_before_anything_changes(results, tmp_path, where):
    state, data, health, numerics = parts(results)
    (tmp_path / "checkpoints").mkdir()
    with torch.no_grad():  # away from the teacher, so that a moving average would show
        for parameter in state.student.parameters():
            parameter.mul_(1.01)
    if where == "loss":
        with torch.no_grad():
            state.student.head.mlp[0].weight[0, 0] = float("nan")
    else:
        state.student.head.mlp[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in (state.student, state.teacher)]
    tiles = data[0][0].tiles
    with pytest.raises(MadError, match=f"{where}.*step 0.*{tiles[0]}.*another run.*init: file:"):
        loop.train(state, data, SelfDistillation(data.run, numerics, health), tmp_path)
    for net, old in zip((state.student, state.teacher), before, strict=True):
        torch.testing.assert_close(dict(net.state_dict()), old, rtol=0, atol=0, equal_nan=True)
    assert not state.optimiser.state
    assert not list((tmp_path / "checkpoints").iterdir())


def test_prototypes_are_frozen_first_and_vectors_do_not_decay(results, tmp_path):
    state, data, health, numerics = parts(results, steps=3, warmup=0, freeze_last_layer=2)
    seen = [state.student.head.prototypes.detach().clone()]
    original = loop.optimise

    def spy(*arguments):
        value = original(*arguments)
        seen.append(state.student.head.prototypes.detach().clone())
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimise", spy)
        loop.train(state, data, SelfDistillation(data.run, numerics, health), tmp_path)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[2], seen[3])
    decays, plain = state.optimiser.param_groups
    assert all(p.ndim >= 2 for p in decays["params"]) and all(p.ndim < 2 for p in plain["params"])
    assert plain["weight_decay"] == 0 and decays["weight_decay"] == pytest.approx(0.4)


def test_mad_shows_parents_to_the_teacher_alone_and_children_to_the_student(results):
    state, data, _, numerics = parts(results, mix={"2.5x-10x": 1})
    batch = next(batches(data, start=0, rank=0, world=1, workers=0))
    seen = {}
    state.student.register_forward_pre_hook(lambda _, inputs: seen.update(student=inputs[0]))
    state.teacher.register_forward_pre_hook(lambda _, inputs: seen.update(teacher=inputs[0]))
    step_loss(state.student, state.teacher, batch, data.run, numerics, 0.04).total.backward()
    (pairs,) = batch.groups
    assert pairs.teacher.shape[:2] == (4, 2) and pairs.student.shape[:2] == (4, 4)  # 6 views of each of 4 pairs
    assert torch.equal(torch.cat(seen["teacher"]), numerics.images(pairs.teacher))
    assert torch.equal(torch.cat(seen["student"]), numerics.images(pairs.student))
    assert all(p.grad is None for p in state.teacher.parameters())
    assert all(p.grad is not None for p in state.student.head.parameters())


def test_losses_are_named_by_method():
    mad, dino = (RunConfig(**fakes.tiny_run(method=method)) for method in ("mad", "dinov2"))
    kinds = ["10x-40x", "standalone"]
    assert len(loss_names(mad, kinds)) == 3 and "children" in loss_names(mad, kinds)[0]
    assert len(loss_names(dino, kinds)) == 2 and "multi-crop" in loss_names(dino, kinds)[0]
