"""Sharded training: two processes over gloo against one, stops and failures, checkpoints that any number of processes resumes.

Two processes add gradients in another order than one; AdamW divides by the root of the second moment, which turns that rounding
into a change of the update wherever a gradient is near 0. Weights are therefore compared to 1e-4 absolutely, a tenth of one
step at these learning rates, and losses to 1e-4 relatively.
"""

import gc
import os
import signal
from pathlib import Path

import fakes
import pytest
import torch
from processes import processes
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from mad.config.training import RunConfig
from mad.files import MadError, StorageError, read_json
from mad.stages import train
from mad.training import checkpoint, loop, memory, method, parallel, ranks, sharding
from mad.training.data import TrainingSet
from mad.training.index import load_index
from mad.training.objective import Numerics, step_loss
from mad.training.records import read_metrics

MASKED = {"method": "dinov2", "ibot": {"weight": 1.0, "bottleneck": 8, "prototypes": 12}, "centring": "ema"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    fakes.write_cohort(folder)
    return folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)


@pytest.fixture
def config_of(results, tmp_path):
    """A configuration of one run in a results folder of its own."""

    def make(name, runtime=None, **changes):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if not (folder / "shard").exists():
            (folder / "shard").symlink_to(results / "shard")
        settings = {"steps": 6, "freeze_last_layer": 1, "min_lr": 1e-4} | changes
        entry = fakes.tiny_run(**settings)
        entry["backbone"]["args"]["depth"] = 2
        entry["runtime"] |= runtime or {}
        return fakes.tiny_config(folder, entry)

    return make


def folder_of(config):
    return Path(config.results) / "train" / "tiny"


def outcome(config):
    """Losses and weights of a finished run."""
    folder = folder_of(config)
    losses = [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]
    return losses, load_file(folder / "encoder" / "model.safetensors")


def assert_equal(first, second, rtol=1e-4, atol=1e-4):
    (losses, weights), (expected, expected_weights) = outcome(first), outcome(second)
    assert losses == pytest.approx(expected, rel=rtol)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "changes", [{"method": "mad", "targets": "cell", "freeze_backbone": 2}, MASKED], ids=["mad", "dinov2"]
)
def test_two_sharded_processes_equal_one(config_of, changes, passes):
    """With a backbone that waits and children that answer to parts of their parent, and with masked patches and EMA centres."""
    runtime = {"parallel": "fsdp", "micro_batch": 2 // passes, "activation_checkpointing": passes == 2}
    sharded = config_of("sharded", runtime, **changes)
    assert processes(2, lambda _: train.run(sharded, "tiny")) == [0, 0]
    alone = config_of("alone", {"micro_batch": 4 // passes}, **changes)
    train.run(alone, "tiny")
    assert_equal(sharded, alone)


def train_until(config, step):
    """What a process does whose second one is asked to stop while it does step `step`."""
    original = loop.optimise

    def optimise(model, state, *arguments):
        if state.step == step and ranks.rank() == ranks.world_size() - 1:
            signal.raise_signal(signal.SIGTERM)
        return original(model, state, *arguments)

    def work(_):
        loop.optimise = optimise
        train.run(config, "tiny")

    return work


def test_a_stopped_run_goes_on_under_any_layout(config_of):
    """Two processes, two that shard, one, and two that shard again; each but the last is stopped by SIGTERM."""
    changes = MASKED | {"steps": 9, "layer_decay": 0.9}
    config = config_of("moved", **changes)
    checkpoints = folder_of(config) / "checkpoints"
    layouts = [("ddp", 2, 1), ("fsdp", 2, 3), ("auto", 1, 5)]
    for number, (layout, count, last) in enumerate(layouts, 1):
        config = config_of("moved", {"parallel": layout, "checkpoint_steps": 100}, **changes)
        assert processes(count, train_until(config, last)) == [train.EXIT_RETRY] * count
        assert [path.name for path in sorted(checkpoints.iterdir())][-1] == f"step_{last + 1:07d}.pt", number
    config = config_of("moved", {"parallel": "fsdp"}, **changes)
    assert processes(2, lambda _: train.run(config, "tiny")) == [0, 0]
    alone = config_of("alone", **changes)
    train.run(alone, "tiny")
    assert_equal(config, alone)
    states = [torch.load(folder_of(c) / "checkpoints" / "step_0000009.pt", weights_only=True) for c in (config, alone)]
    assert layout_of(states[0]) == layout_of(states[1])  # an old checkpoint and a new one are the same kind of file
    teacher = {name.removeprefix("backbone."): tensor for name, tensor in states[0]["teacher"].items()}
    exported = outcome(config)[1]
    assert all(torch.equal(teacher[name], tensor) for name, tensor in exported.items())


@pytest.mark.parametrize("fault", ["stop", "error"])
def test_no_replica_outlives_its_group(config_of, fault):
    """Else its reducer would end the group, which waits for ever in one stop of ten on a busy machine."""
    config = config_of("left", {"parallel": "ddp"})

    def work(rank):
        destroy = ranks.dist.destroy_process_group

        def check():
            alive = [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]
            destroy()
            os._exit(50 + len(alive))

        ranks.dist.destroy_process_group = check
        if fault == "stop":
            train_until(config, 1)(rank)
        else:
            break_loss(rank)
            train.run(config, "tiny")

    assert processes(2, work) == [50, 50]


def test_processes_agree_on_the_precision(config_of):
    """`auto` on two machines of which one is not good at bf16."""
    config = config_of("mixed", {"parallel": "ddp"}, precision="auto")

    def work(rank):
        train.choose_dtype = lambda *_: [torch.bfloat16, torch.float32][rank]
        train.run(config, "tiny")

    assert processes(2, work) == [0, 0]
    assert read_json(folder_of(config) / "summary.json")["precision"] == "float32"


def layout_of(value):
    """Keys, shapes and types of a nested state."""
    if isinstance(value, dict):
        return {key: layout_of(part) for key, part in value.items()}
    return (tuple(value.shape), value.dtype) if torch.is_tensor(value) else type(value)


def break_gradient(rank):
    original = loop.accumulate

    def accumulate(model, *arguments):
        seen = original(model, *arguments)
        if rank == 1:
            model.head.mlp[0].weight.grad.to_local()[0, 0] = float("inf")
        return seen

    loop.accumulate = accumulate


def break_loss(rank):
    original = method.step_loss

    def step_loss(*arguments):
        loss = original(*arguments)
        return type(loss)(loss.total * float("nan" if rank == 1 else 1), loss.dino, loss.ibot, loss.spread)

    method.step_loss = step_loss


def break_data(rank):
    original = loop.batches

    def batches(*arguments, **options):
        yield next(original(*arguments, **options))
        if rank == 1:
            raise MadError("a tile cannot be read")
        yield from original(*arguments, **options)

    loop.batches = batches


def break_disk(_):
    def save(*_):
        raise StorageError("the disk is full")

    loop.checkpoint.save = save


def break_records(_):
    def refuse(*_):
        raise StorageError("the disk is full")

    loop.Records = refuse


@pytest.mark.parametrize("fault", [break_gradient, break_loss, break_data, break_disk, break_records])
def test_where_one_process_fails_all_leave(config_of, fault, capfd):
    config = config_of("broken", {"parallel": "fsdp"})

    def work(rank):
        fault(rank)
        train.run(config, "tiny")

    assert processes(2, work) == [2, 2]
    told = capfd.readouterr().err
    if fault in (break_data, break_disk, break_records):
        assert told.count("MadError: another process failed") == 1
    else:
        assert told.count("MadError: train: the ") == 2
        assert told.count("is not finite on another process") == (fault is break_loss)  # the norm is that of all
    assert not list((folder_of(config) / "checkpoints").iterdir())


def test_bf16_passes_agree_with_those_of_ddp(config_of):
    """On the CPU both multiply in bf16 under autocast; sums over passes of a step are rounded at other places."""
    configs = [
        config_of(name, {"parallel": name}, precision="bf16", steps=3, warmup=1, **MASKED) for name in ("fsdp", "ddp")
    ]
    for config in configs:
        assert processes(2, lambda _, config=config: train.run(config, "tiny")) == [0, 0]
    assert_equal(*configs, rtol=1e-2, atol=4e-3)


def estimate(config, sharded):
    """Of the memory of a step on this process."""
    entry = config.run("tiny")
    index = load_index(Path(config.results) / "shard", "train", entry.children)
    data = TrainingSet(index, entry, fakes.TILE_PX, 16, 0)
    numerics = Numerics((0.5,) * 3, (0.5,) * 3, torch.device("cpu"), torch.float32)
    student, teacher = loop.build_networks(entry, fakes.TILE_PX, 0)
    for network in (student, teacher) if sharded else ():
        sharding.shard(network, torch.float32, numerics.device)

    def loss(batch):
        return step_loss(student, teacher, batch, entry, numerics, 0.04).total

    return memory.estimate_memory(student, teacher, memory.trial_batches(data), loss, 2, passes=2)


def test_the_memory_estimate_counts_shards(config_of, tmp_path):
    config = config_of("memory", **MASKED)

    def work(rank):
        with ranks.process_group():
            torch.save([vars(estimate(config, sharded)) for sharded in (True, False)], tmp_path / f"{rank}.pt")

    assert processes(2, work) == [0, 0]
    student, _ = loop.build_networks(config.run("tiny"), fakes.TILE_PX, 0)
    block, head = (sum(p.numel() * 4 for p in part.parameters()) for part in (student.backbone.blocks[0], student.head))
    moments = []
    for part, whole in (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)):
        assert (part["per_sample"], part["fixed"]) == (whole["per_sample"], whole["fixed"])
        assert part["weights"] == part["teacher"] == part["moments"] // 2 + 2 * block and block > head
        assert part["gradients"] == part["moments"] // 2 + whole["gradients"]  # whole until the last of two passes
        moments.append(part["moments"] / whole["moments"])
    assert sum(moments) == 1 and max(moments) < 0.6  # not .5: tokens, a single row, are of the first process alone


def test_compiled_blocks_and_dropped_paths_shard_alike(config_of, monkeypatch):
    changes = {"steps": 3, "warmup": 1, "drop_path": 0.4, **MASKED}
    runtime = {"parallel": "fsdp", "activation_checkpointing": True}
    plain = config_of("plain", runtime, **changes)
    compiled = config_of("compiled", runtime | {"compile": True}, **changes)
    original = parallel.compile_blocks
    monkeypatch.setattr(parallel, "compile_blocks", lambda *networks: original(*networks, backend="aot_eager"))
    for config in (plain, compiled):
        assert processes(2, lambda _, config=config: train.run(config, "tiny")) == [0, 0]
    assert_equal(compiled, plain)


def test_a_group_that_was_left_leaves_no_threads():
    """Those of gloo would meet the end of the interpreter, which now and then aborts the process."""
    threads = Path("/proc/self/task")

    def work(_):
        with ranks.process_group():
            ranks.gather(torch.ones(2, 3, requires_grad=True)).sum().backward()
            assert len(list(threads.iterdir())) > 1
        assert len(list(threads.iterdir())) == 1

    assert processes(2, work) == [0, 0]


def test_what_cannot_be_sharded_is_refused(monkeypatch):
    entry = fakes.tiny_run(mix_mode="within", runtime={"parallel": "fsdp"})
    assert not sharding.is_wanted(RunConfig(**entry))  # a single process
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(MadError, match=r"runs.tiny.runtime.parallel: .*mix_mode"):
        sharding.is_wanted(RunConfig(**entry))
    assert sharding.is_wanted(RunConfig(**entry, mix={"2.5x-10x": 1}))  # children alone
    assert not sharding.is_wanted(RunConfig(**fakes.tiny_run(runtime={"parallel": "auto"})))
    with pytest.raises(MadError, match="batch norms"):
        parallel.check_runtime(RunConfig(**fakes.tiny_run(runtime={"parallel": "fsdp"})), torch.nn.BatchNorm2d(1), 2)


def test_processes_that_see_other_checkpoints_are_refused(config_of, capfd):
    config = config_of("apart", {"parallel": "ddp"}, steps=3, warmup=1)
    assert processes(2, lambda _: train.run(config, "tiny")) == [0, 0]
    (folder_of(config) / "encoder" / "provenance.json").unlink()
    original = checkpoint.load_latest

    def work(rank):
        checkpoint.load_latest = lambda *args, **options: original(*args, **options) if rank == 0 else None
        train.run(config, "tiny")

    assert processes(2, work) == [2, 2]
    told = capfd.readouterr().err
    assert "resumes at step 3, others between 0 and 3" in told and "resumes at step 0, others between 0 and 3" in told
