"""Method `xmag` through its stage: stored and new targets, ablations, resumption, processes, another teacher."""

import shutil
from pathlib import Path

import fakes
import pandas as pd
import pytest
import timm
import torch
from processes import processes
from safetensors.torch import load_file

from mad.files import MadError, digest, read_json, sha256_file, write_json, write_parquet
from mad.models.distill import DistillNetwork
from mad.models.initial import common_licence
from mad.models.vit import build_backbone
from mad.models.weights import load_weights
from mad.stages import embed, train
from mad.tiles.embeddings import source_key
from mad.training import loop
from mad.training.data import TrainingSet
from mad.training.distill import CrossMagnification
from mad.training.distill_health import choose_field_set
from mad.training.features import Features
from mad.training.index import load_index
from mad.training.objective import Numerics
from mad.training.optimiser import build_optimiser
from mad.training.records import read_metrics
from mad.training.teacher import find_teacher

NUMERICS = Numerics((0.5,) * 3, (0.5,) * 3, torch.device("cpu"), torch.float32)
PLAIN = {"jitter": 0.0}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Shards, and the embeddings of an untrained teacher and of colours, made by stage `embed` itself."""
    folder = tmp_path_factory.mktemp("results")
    fakes.write_cohort(folder)
    slides = pd.DataFrame({"slide_id": ["S01", "S02", "S03"], "split": ["train", "train", "val"]})
    write_parquet(folder / "cohort" / "slides.parquet", slides.assign(annotation=None))
    embed.run(fakes.distill_config(folder), "teacher")
    (folder / "embed" / "teacher").rename(folder / "embed" / "network")
    embed.run(fakes.distill_config(folder, teacher="colour"), "teacher")
    (folder / "embed" / "teacher").rename(folder / "embed" / "colour")
    return folder


@pytest.fixture
def fresh(results, tmp_path, monkeypatch):
    """A results folder of its own that shares shards and embeddings of the network; no picture is drawn."""
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
    (tmp_path / "shard").symlink_to(results / "shard")
    (tmp_path / "embed").mkdir()
    (tmp_path / "embed" / "teacher").symlink_to(results / "embed" / "network")
    return tmp_path


def run(config, name="tiny"):
    train.run(config, name)
    return Path(config.results) / "train" / name


# targets


def training_set(config, results, cached, **changes):
    entry = config.run("tiny")
    index = load_index(results / "shard", "train", entry.children)
    teacher = find_teacher(config, entry.distill.model_copy(update={"cache": cached}))
    return TrainingSet(index, entry, fakes.TILE_PX, 16, 3, features=teacher.features(index)), teacher


@pytest.mark.parametrize("level, kind", [("fine", "10x-40x"), ("coarse", "2.5x-10x")])
def test_cached_targets_are_those_of_the_network(results, tmp_path, level, kind):
    """Colour statistics do not change under flips: stored and changed in place, or of flipped tiles, they are equal."""
    (tmp_path / "shard").symlink_to(results / "shard")
    (tmp_path / "embed").mkdir()
    (tmp_path / "embed" / "teacher").symlink_to(results / "embed" / "colour")
    entry = fakes.tiny_xmag(photometric=PLAIN, distill={"teacher_level": level}, mix={kind: 1})
    config = fakes.distill_config(tmp_path, entry, teacher="colour")
    found = []
    for cached in (True, False):
        data, teacher = training_set(config, tmp_path, cached)
        batch = data.__getitems__(range(12))
        method = CrossMagnification(data.run, data.run.distill, NUMERICS, None, teacher)
        (group,) = batch.groups
        assert group.teacher.shape[1] == (0 if cached else 16 if level == "fine" else 1)
        assert len(batch.tiles) == 12 * (1 if cached or level == "coarse" else 17)
        found.append((group.student, method.targets(group)))
    (images, stored), (same_images, anew) = found
    assert torch.equal(images, same_images) and stored.shape == (12, 16 if level == "fine" else 1, 6)
    torch.testing.assert_close(stored, anew, atol=1e-6, rtol=1e-6)
    assert len({tuple(row) for row in (stored - stored[:, :1]).flatten(1).sign().tolist()}) > (level == "fine")


def test_stored_embeddings_are_those_of_the_frozen_network(fresh):
    config = fakes.distill_config(fresh)
    entry, index = config.run("tiny"), load_index(fresh / "shard", "val", 4)
    sets = []
    for cached in (True, False):
        distill = entry.distill.model_copy(update={"cache": cached})
        teacher = find_teacher(config, distill)
        assert (teacher.encoder is None) == cached and teacher.dim == 24
        sets.append((choose_field_set({"val": index}, entry, distill, fakes.TILE_PX, teacher), teacher.sha256))
    (stored, sha), (anew, same) = sets
    assert sha == same and stored.source == "val" and stored.kind == "10x-40x" and stored.targets.shape == (8, 16, 24)
    assert torch.equal(stored.images, anew.images)
    torch.testing.assert_close(stored.targets, anew.targets, atol=1e-5, rtol=1e-5)


def test_features_that_are_missing_are_named(fresh, results):
    index = load_index(fresh / "shard", "train", 4)
    with pytest.raises(MadError, match="not embedded whole; run `mad embed` for encoder 'nobody'"):
        Features(fresh / "embed" / "nobody", index)
    stray = index.rows.assign(tile_id=index.rows["tile_id"] + "_9")
    with pytest.raises(MadError, match=r"S01.parquet: lacks S01_.*_9; run `mad embed teacher` again"):
        Features(
            fresh / "embed" / "teacher", type(index)(index.folder, stray, index.pairs, index.standalone, index.digest)
        )
    config = fakes.distill_config(fresh)
    changed = config.model_copy(update={"encoders": [config.encoders[0].model_copy(update={"pooling": "avg"})]})
    with pytest.raises(MadError, match=r"embedded with another pooling than encoders.teacher has now"):
        find_teacher(changed, config.run("tiny").distill)


def test_embeddings_of_other_pixels_are_refused(fresh):
    """Slides were cut again since, with tiles of the same ids: nothing else tells that the embeddings are of former ones."""
    config = fakes.distill_config(fresh)
    (fresh / "shard").unlink()
    fakes.write_cohort(fresh)
    Features(fresh / "embed" / "teacher", load_index(fresh / "shard", "train", 4))  # equal tables, written anew
    fakes.write_slide(fresh / "shard", "S02", "train", 8, 4, seed=7)
    with pytest.raises(
        MadError, match=r"S02.npy: embedded from other tiles than .*S02.parquet.*; run `mad embed teacher`"
    ):
        train.run(config, "tiny")
    assert not (fresh / "train").exists()
    network = (fresh / "embed" / "teacher").resolve()
    (fresh / "embed" / "teacher").unlink()
    shutil.copytree(network, fresh / "embed" / "teacher")
    shutil.copytree(network.parents[1] / "cohort", fresh / "cohort")
    embed.run(config, "teacher")
    Features(fresh / "embed" / "teacher", load_index(fresh / "shard", "train", 4))


# the whole stage


def outcome(folder):
    records = [
        {k: v for k, v in r.items() if k not in ("data_wait_s", "images_per_s")}
        for r in read_metrics(folder / "metrics.jsonl")
    ]
    return (folder / "encoder" / "model.safetensors").read_bytes(), records


ABLATIONS = {
    "both": {},
    "global only": {"local_weight": 0},
    "local only": {"global_weight": 0},
    "resized": {"input": "resized"},
    "coarse": {"teacher_level": "coarse"},
    "anew": {"cache": False},
    "resized coarse anew": {"input": "resized", "teacher_level": "coarse", "cache": False},
}


@pytest.mark.parametrize("distill", ABLATIONS.values(), ids=ABLATIONS)
def test_every_ablation_trains_and_is_told(fresh, distill):
    config = fakes.distill_config(fresh, fakes.tiny_xmag(distill=distill, steps=6))
    folder = run(config)
    summary, settings = read_json(folder / "summary.json"), config.run("tiny").distill
    last = read_metrics(folder / "metrics.jsonl")[-1]
    total = settings.global_weight * last["global_loss"] + settings.local_weight * last["local_loss"]
    assert last["loss"] == pytest.approx(total) and last["kinds"] == "10x-40x"
    assert last["cosine"] == pytest.approx(-last["loss"] / (settings.global_weight + settings.local_weight))
    assert bool(last["global_loss"]) == bool(settings.global_weight) and bool(last["local_loss"]) == bool(
        settings.local_weight
    )
    named = {"global_cosine": settings.global_weight, "local_cosine": settings.local_weight}
    assert all((name in summary["health"]) == bool(weight) for name, weight in named.items())
    assert summary["teacher_sha256"] and "ln_k" not in summary and summary["health_kind"] == "10x-40x"
    assert summary["samples"] == {"10x-40x": 16}
    card = (folder / "encoder" / "README.md").read_text()
    assert (
        f"Frozen teacher: `teacher` (random:source), weights `{summary['teacher_sha256']}`, licence: apache-2.0" in card
    )
    assert card.count("cosine of") == bool(settings.global_weight) + bool(settings.local_weight)
    exported = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True).state_dict()
    average = torch.load(folder / "checkpoints" / "step_0000006.pt", weights_only=True)["teacher"]
    assert all(torch.equal(average[f"backbone.{name}"], tensor) for name, tensor in exported.items())


def test_the_student_learns_and_the_average_is_exported(fresh):
    config = fakes.distill_config(fresh, fakes.tiny_xmag(steps=60, lr=3e-3, photometric=PLAIN))
    records = read_metrics(run(config) / "metrics.jsonl")
    start, end = records[0], records[-1]
    assert end["cosine"] > start["cosine"] + 0.3
    health = end["health"]
    assert health["global_cosine"] > start["cosine"] and health["fields"] == 8
    rates = [record["lr"] for record in records]
    assert (
        rates[0] == pytest.approx(1.5e-3) and max(rates) == pytest.approx(3e-3) and rates[-1] < 1e-5
    )  # a cosine to its end
    (run_folder,) = (fresh / "train").glob("*/checkpoints")
    backbone = build_backbone(config.runs[0].backbone, config.tile.tile_px)
    loaded = load_weights(backbone, max(run_folder.glob("step_*.pt")))
    assert loaded.left_out == ("global_head", "local_head"), "what another run starts from by `init: file:`"


@pytest.mark.parametrize("cache", [True, False])
def test_a_stopped_and_resumed_run_ends_bit_equal(fresh, tmp_path_factory, monkeypatch, cache):
    entry = fakes.tiny_xmag(distill={"cache": cache}, steps=9)
    config = fakes.distill_config(fresh, entry)
    original, seen = loop.optimise, []

    def stop(*arguments):
        seen.append(original(*arguments))
        if len(seen) == 6:
            raise KeyboardInterrupt
        return seen[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "optimise", stop)
        run(config)
    assert [path.name for path in (fresh / "train" / "tiny" / "checkpoints").iterdir()] == ["step_0000004.pt"]
    resumed = outcome(run(config))
    whole = tmp_path_factory.mktemp("whole")
    for name in ("shard", "embed"):
        (whole / name).symlink_to(fresh / name)
    assert outcome(run(fakes.distill_config(whole, entry))) == resumed


def test_passes_and_other_magnifications_together(fresh, tmp_path_factory):
    """Both transitions within a batch; two passes of two samples give the gradient of four at once."""
    entry = fakes.tiny_xmag(mix={"2.5x-10x": 1, "10x-40x": 1}, mix_mode="within", steps=4)
    runtime = entry["runtime"]
    once = run(fakes.distill_config(fresh, entry))
    other = tmp_path_factory.mktemp("other")
    for name in ("shard", "embed"):
        (other / name).symlink_to(fresh / name)
    entry["runtime"] = runtime | {"micro_batch": 2}
    twice = run(fakes.distill_config(other, entry))
    losses = [[record["loss"] for record in read_metrics(folder / "metrics.jsonl")] for folder in (once, twice)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "10x-40x+2.5x-10x" in {record["kinds"] for record in read_metrics(once / "metrics.jsonl")}
    one, two = (load_file(folder / "encoder" / "model.safetensors") for folder in (once, twice))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parallel, distill", [("ddp", {"cache": False}), ("fsdp", {}), ("ddp", {"global_weight": 0})])
def test_two_processes_agree_with_one(fresh, tmp_path_factory, parallel, distill):
    entry = fakes.tiny_xmag(distill=distill, steps=6, min_lr=1e-4)
    entry["runtime"] |= {"parallel": parallel}
    many = fakes.distill_config(fresh, entry)
    assert processes(2, lambda _: train.run(many, "tiny")) == [0, 0]
    alone = tmp_path_factory.mktemp("alone")
    for name in ("shard", "embed"):
        (alone / name).symlink_to(fresh / name)
    single = run(fakes.distill_config(alone, entry))
    losses = [
        [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]
        for folder in (fresh / "train" / "tiny", single)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    first, second = (
        load_file(folder / "encoder" / "model.safetensors") for folder in (fresh / "train" / "tiny", single)
    )
    for name in second:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_another_teacher_is_another_run(fresh, results):
    config = fakes.distill_config(fresh, fakes.tiny_xmag(steps=3))
    folder = run(config)
    first = read_json(folder / "identity.json")
    (fresh / "embed" / "teacher").unlink()
    copied = fresh / "embed" / "teacher"
    copied.mkdir()
    for path in (results / "embed" / "network").iterdir():
        (copied / path.name).symlink_to(path) if path.is_file() and path.name != "audit.json" else None
    audit = read_json(results / "embed" / "network" / "audit.json") | {"weights_sha256": "other"}
    write_json(copied / "audit.json", audit)
    for slide in ("S01", "S02", "S03"):
        (copied / f"{slide}.json").unlink()
        key = source_key(audit, sha256_file(results / "shard" / f"{slide}.parquet"))
        write_json(copied / f"{slide}.json", {"key": digest(key)})
    run(config)
    assert (folder / "archive" / f"{first['recipe_digest']}-{first['data_digest']}" / "encoder").exists()
    assert read_json(folder / "identity.json")["teacher_sha256"] == "other" != first["teacher_sha256"]


def test_licences_meet():
    assert common_licence("apache-2.0", "Apache-2.0") == "apache-2.0"
    assert common_licence("apache-2.0", None) is None and common_licence("apache-2.0", "cc-by-nc-4.0") is None


def test_a_backbone_without_blocks_is_refused_before_anything_is_moved(fresh):
    entry = fakes.tiny_xmag(
        backbone={"model": "vit_tiny_patch16_224", "args": {"depth": 1, "embed_dim": 24, "patch_size": 16}}
    )
    with pytest.raises(MadError, match="2 x 2 tokens at 32 px"):
        run(fakes.distill_config(fresh, entry))
    assert not (fresh / "train" / "tiny" / "checkpoints").exists()


def test_the_networks_of_a_run_are_equal_and_layers_learn_by_depth(fresh):
    entry = fakes.distill_config(fresh, fakes.tiny_xmag(layer_decay=0.5)).run("tiny")
    student, average = loop.build_networks(
        entry, fakes.TILE_PX, 0, build=lambda net, run_: DistillNetwork(net, run_.distill, 24)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), average.state_dict().values(), strict=True)
    )
    assert not any(p.requires_grad for p in average.parameters()) and student.last_layers == []
    scales = {group["lr_scale"] for group in build_optimiser(student, entry).param_groups}
    assert max(scales) == 1 and min(scales) < 1
