"""Methods meet losses: what student and teacher are shown, masks that reach the student, and runs that resume."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mad.config.training import RunConfig
from mad.files import MadError, write_json
from mad.models.cells import feature_grid
from mad.models.masked import masked_forward, patch_tokens
from mad.stages import train
from mad.training import loop
from mad.training.data import TrainingSet, batches
from mad.training.index import load_index
from mad.training.loss_names import loss_names
from mad.training.objective import Numerics, present, step_loss
from mad.training.ssl import sinkhorn_knopp

IBOT = {"weight": 1.0, "head": "separate", "prototypes": 12, "bottleneck": 8}
SHARED = {"weight": 1.0, "head": "shared"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    fakes.write_cohort(folder)
    return folder


@pytest.fixture
def fresh(results, tmp_path):
    (tmp_path / "shard").symlink_to(results / "shard")
    return tmp_path


def parts(results, **changes):
    """Student, teacher, first batch, run and numerics of a tiny run; the teacher is moved away from the student."""
    run = RunConfig(**fakes.tiny_run(**changes))
    index = load_index(results / "shard", "train", run.children)
    student, teacher = loop.build_networks(run, fakes.TILE_PX, 0)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    grid = feature_grid(student.backbone, fakes.TILE_PX) if run.ibot.weight or run.targets == "cell" else None
    data = TrainingSet(index, run, fakes.TILE_PX, 16, 0, grid)
    batch = next(batches(data, start=0, rank=0, world=1, workers=0))
    return student, teacher, batch, run, Numerics((0.5,) * 3, (0.5,) * 3, torch.device("cpu"), torch.float32)


def cross_entropy(scores, target, temperature):
    """-sum_k target_k log softmax_k(scores / temperature) of one view, in float64."""
    logits = [float(value) / temperature for value in scores]
    log_z = math.log(sum(math.exp(value) for value in logits))
    return -sum(float(q) * (logit - log_z) for q, logit in zip(target, logits, strict=True))


@pytest.mark.parametrize("ibot", [IBOT, SHARED], ids=["separate", "shared"])
def test_mad_global_equals_a_loop_over_its_terms_and_masked_patches(results, ibot):
    changes = {"method": "mad_global", "mix": {"10x-40x": 1}, "ibot": ibot, "koleo": 0.0}
    student, teacher, batch, run, numerics = parts(results, **changes)
    loss = step_loss(student, teacher, batch, run, numerics, 0.05)
    (group,) = batch.groups
    assert group.kind == "global_pair" and group.teacher.shape[:2] == (4, 2) and group.student.shape[:2] == (4, 4)
    masks = group.masks  # [4, 2, 16]
    assert (masks.flatten(0, 1).sum(dim=1) > 0).sum() == 4  # half of 8

    parents, children = numerics.images(group.teacher), numerics.images(group.student)
    with torch.no_grad():
        seen, features = masked_forward(teacher.backbone, parents)
        taught = patch_tokens(teacher.backbone, features)
        q = sinkhorn_knopp(teacher.head(seen), 0.05).unflatten(0, (4, 2))
        hidden, features = masked_forward(student.backbone, parents, masks.flatten(0, 1), student.mask_token)
        guesses = patch_tokens(student.backbone, features)
        p_parent = student.head(hidden).unflatten(0, (4, 2))
        p_child = student.head(student.backbone(children)).unflatten(0, (4, 4))
        flat = masks.flatten(0, 1)
        patch_head = [network.patch_head or network.head for network in (student, teacher)]
        q_patch = sinkhorn_knopp(patch_head[1](taught[flat]), 0.05)
        p_patch = patch_head[0](guesses[flat])
    dino: list[float] = []
    for b in range(4):
        terms = [cross_entropy(p_child[b, s], q[b, t], 0.1) for s in range(4) for t in range(2)]
        terms += [cross_entropy(p_parent[b, s], q[b, 1 - s], 0.1) for s in range(2)]
        dino.append(sum(terms) / 10)
    dino_loss, ibot_loss, total = (float(value.detach()) for value in (loss.dino, loss.ibot, loss.total))
    assert dino_loss == pytest.approx(sum(dino) / 4, rel=1e-4)
    patches, row = 0.0, 0
    for image in range(8):
        count = int(flat[image].sum())
        patches += sum(cross_entropy(p_patch[row + n], q_patch[row + n], 0.1) / count for n in range(count))
        row += count
    assert ibot_loss == pytest.approx(patches / 8, rel=1e-4)
    assert total == pytest.approx(dino_loss + ibot_loss, rel=1e-5)


@pytest.mark.parametrize(("method", "weight"), [("mad", 1.0), ("mad_global", 1.0), ("mad_global", 0.25)])
@pytest.mark.parametrize("targets", ["tile", "cell"])
def test_what_children_answer_to_equals_a_loop_over_terms(results, method, weight, targets):
    """By hand: the mean of the parent's tokens in the child's quarter, whichever way the parent was turned."""
    changes = {"method": method, "parent_weight": weight, "targets": targets, "mix": {"10x-40x": 1}, "koleo": 0.0}
    student, teacher, batch, run, numerics = parts(results, **changes)
    loss = step_loss(student, teacher, batch, run, numerics, 0.05)
    (group,) = batch.groups
    parents, children = numerics.images(group.teacher), numerics.images(group.student)
    with torch.no_grad():
        features = teacher.backbone.forward_features(parents)
        scores = [teacher.head(teacher.backbone(parents)).unflatten(0, (4, 2))]
        if targets == "cell":
            tokens = patch_tokens(teacher.backbone, features).unflatten(0, (4, 2))  # [B, T, N, D]
            cells = torch.stack(
                [
                    tokens[b, t][group.cells[b, t, s] > 0].mean(0)  # N = 16 cells: each child is one token
                    for b in range(4) for t in range(2) for s in range(4)
                ]
            )  # fmt: skip
            whole = scores if method == "mad_global" else []
            scores = [*whole, teacher.head(cells).unflatten(0, (4, 8))]
        q = sinkhorn_knopp(torch.cat(scores, dim=1).flatten(0, 1), 0.05).unflatten(0, (4, -1))
        p_child = student.head(student.backbone(children)).unflatten(0, (4, 4))
        p_parent = student.head(student.backbone(parents)).unflatten(0, (4, 2))
    first = 2 if method == "mad_global" else 0
    found = []
    for b in range(4):
        own = [q[b, first + 4 * t + s] if targets == "cell" else q[b, t] for t in range(2) for s in range(4)]
        terms = [cross_entropy(p_child[b, s], own[4 * t + s], 0.1) for t in range(2) for s in range(4)]
        total, weights = sum(terms), 8.0
        if method == "mad_global":
            total += weight * sum(cross_entropy(p_parent[b, t], q[b, 1 - t], 0.1) for t in range(2))
            weights += 2 * weight
        found.append(total / weights)
    assert float(loss.dino.detach()) == pytest.approx(sum(found) / 4, rel=1e-4)


def test_masks_reach_the_student_and_never_the_teacher(results):
    """A student that is not given the masks would train without an error, on a task without content."""
    student, teacher, batch, run, numerics = parts(results, method="dinov2", ibot=IBOT)
    seen = {}
    for name, network in (("student", student), ("teacher", teacher)):
        network.backbone.norm_pre.register_forward_hook(
            lambda _, inputs, __, name=name: seen.update({name: seen.get(name, inputs[0].detach())})
        )
    with torch.no_grad():
        student.mask_token.fill_(50.0)
    step_loss(student, teacher, batch, run, numerics, 0.05).total.backward()
    (group,) = batch.groups
    masks = group.masks.flatten(0, 1)
    assert masks.any() and not masks.all(dim=1).any()
    patches = seen["student"][:, student.backbone.num_prefix_tokens :]
    assert (patches[masks] > 40).all() and (patches[~masks] < 40).all()  # positions are small beside 50
    with torch.no_grad():
        expected = teacher.backbone._pos_embed(teacher.backbone.patch_embed(numerics.images(group.teacher)))
    assert torch.equal(seen["teacher"], expected)
    assert student.mask_token.grad.abs().sum() > 0
    assert student.patch_head.prototypes.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_the_students_guess_changes_with_the_masks(results):
    student, _, batch, _, numerics = parts(results, method="dinov2", ibot=IBOT)
    (group,) = batch.groups
    images, masks = numerics.images(group.teacher), group.masks.flatten(0, 1)
    with torch.no_grad():
        student.mask_token.normal_()
        hidden = student([images], masks)[1]
        shown = student([images], masks, hide=False)[1]
        plain = student([images])[1]
    assert hidden[-1].shape == shown[-1].shape == (int(masks.sum()), 12)
    assert not torch.allclose(hidden[-1], shown[-1], atol=1e-3)
    torch.testing.assert_close(shown[0], plain[0])
    masked = masks.any(dim=1)
    torch.testing.assert_close(hidden[0][~masked], plain[0][~masked])
    assert not torch.allclose(hidden[0][masked], plain[0][masked], atol=1e-4)


def test_without_weight_nothing_is_masked_and_the_network_is_as_before(results):
    student, teacher, batch, run, numerics = parts(results)
    assert all(group.masks is None for group in batch.groups)
    assert {name.split(".")[0] for name in student.state_dict()} == {"backbone", "head"}
    loss = step_loss(student, teacher, batch, run, numerics, 0.05)
    assert float(loss.ibot) == 0 and torch.equal(loss.total, loss.dino + run.koleo * loss.spread)


@pytest.mark.parametrize(
    ("method", "kind", "full_size", "masked"),
    [
        ("mad", "10x-40x", 4, 0),
        ("mad_global", "10x-40x", 6, 2),
        ("mad", "standalone", 2, 2),
        ("dinov2", "10x-40x", 2, 2),
    ],
)
def test_each_method_shows_its_views(results, method, kind, full_size, masked):
    mix = {kind: 1.0} if (method, kind) != ("mad", "10x-40x") else {kind: 1.0, "standalone": 1e-6}
    _, _, batch, _, _ = parts(results, method=method, mix=mix, ibot={**IBOT, "probability": 1.0})
    (group,) = batch.groups
    shown = present(group)
    assert shown.full_size.shape[1] == full_size and shown.shared == masked
    assert shown.masks.shape == (4, full_size, 16)
    assert shown.masks.any(dim=2)[:, full_size - masked :].all()
    assert not shown.masks[:, : full_size - masked].any()
    if masked:
        assert torch.equal(shown.full_size[:, -masked:], group.teacher)
        assert not shown.terms[full_size - masked : full_size].diagonal().any()  # no view against itself


def test_masks_leave_views_alone_and_do_not_depend_on_processes(results):
    run = RunConfig(**fakes.tiny_run(method="mad_global", ibot=IBOT, mix_mode="within"))
    index = load_index(results / "shard", "train", 4)
    plain, masked = (TrainingSet(index, run, fakes.TILE_PX, 16, 0, grid) for grid in (None, (4, 4)))
    for n in range(12):
        (a,), (b,) = plain[n], masked[n]
        np.testing.assert_array_equal(np.stack(a.teacher), np.stack(b.teacher))
        assert a.masks is None and b.masks.shape == (2, 16)
    whole = next(batches(masked, start=3, rank=0, world=1, workers=0))
    halves = [next(batches(masked, start=3, rank=rank, world=2, workers=0)) for rank in (0, 1)]
    for group in whole.groups:
        parts = [found.masks for half in halves for found in half.groups if found.kind == group.kind]
        assert torch.equal(torch.cat(parts), group.masks)


def test_views_that_both_networks_see_are_converted_once(results, monkeypatch):
    converted, real = [], Numerics.images
    monkeypatch.setattr(
        Numerics, "images", lambda self, views: converted.append(tuple(views.shape[:3])) or real(self, views)
    )
    for method, shapes in (("dinov2", [(4, 2, 32), (4, 2, 16)]), ("mad", [(4, 2, 32), (4, 4, 32)])):
        student, teacher, batch, run, numerics = parts(results, method=method, mix={"10x-40x": 1})
        step_loss(student, teacher, batch, run, numerics, 0.05)
        assert converted == shapes
        converted.clear()


def test_centres_follow_the_teacher_and_serve_one_step_later(results):
    changes = {"method": "dinov2", "ibot": IBOT, "centring": "ema", "koleo": 0.0}
    student, teacher, batch, run, numerics = parts(results, **changes)
    (group,) = batch.groups
    with torch.no_grad():
        taught = teacher([numerics.images(group.teacher)], group.masks.flatten(0, 1), hide=False)[1]
    step_loss(student, teacher, batch, run, numerics, 0.05)
    for name, scores in zip(("centre", "patch_centre"), taught, strict=True):
        torch.testing.assert_close(getattr(student, name), 0.1 * scores.mean(dim=0))
        assert not getattr(teacher, name).any()
    values = []
    for centre in (torch.zeros(24), torch.linspace(-1, 1, 24)):
        teacher.centre.copy_(centre)
        values.append(float(step_loss(student, teacher, batch, run, numerics, 0.05).dino.detach()))
    assert values[0] != pytest.approx(values[1], rel=1e-3)


CENTRED = {"method": "mad_global", "ibot": IBOT, "centring": "ema", "spread": "kde", "koleo": 0.05, "drop_path": 0.3}


def test_a_resumed_run_ends_bit_equal_centres_and_masks_included(fresh):
    config = fakes.tiny_config(fresh, fakes.tiny_run(**CENTRED))
    folder = fresh / "train" / "tiny"
    train.run(config, "tiny")
    last = folder / "checkpoints" / "step_0000010.pt"
    first = torch.load(last, weights_only=True)
    assert first["teacher"]["centre"].any() and first["teacher"]["patch_centre"].any()
    last.unlink()
    (folder / "encoder" / "provenance.json").unlink()
    train.run(config, "tiny")  # from step 8
    again = torch.load(last, weights_only=True)
    for network in ("student", "teacher"):
        assert all(torch.equal(again[network][name], tensor) for name, tensor in first[network].items())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(record["ibot"] > 0 for record in records) and {record["kinds"] for record in records} > {"global_pair"}
    exported = load_file(folder / "encoder" / "model.safetensors")
    assert not [name for name in exported if "mask" in name or "centre" in name]
    card = (folder / "encoder" / "README.md").read_text()
    assert "the student also sees these views of the parent" in card and "iBOT" in card and "KDE" in card


@pytest.mark.parametrize(("method", "targets"), [("mad", "tile"), ("mad_global", "cell")])
def test_two_processes_agree_with_one(fresh, tmp_path_factory, results, method, targets):
    """Under `mad` with alternating kinds some steps have no masked patch at all, and every parameter still takes part."""
    changes = {"method": method, "ibot": IBOT, "centring": "ema" if method == "mad" else "sinkhorn", "spread": "kde"}
    changes |= {"targets": targets}
    entry = fakes.tiny_run(**changes, steps=6, warmup=1, freeze_last_layer=0, koleo=0.05)
    config = fakes.tiny_config(fresh, entry)
    write_json(fresh / "config.json", config.model_dump(mode="json"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mad"]
    command = [*launcher, "train", "tiny", "--config", str(fresh / "config.json")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    alone = tmp_path_factory.mktemp("alone")
    (alone / "shard").symlink_to(results / "shard")
    train.run(fakes.tiny_config(alone, entry), "tiny")
    states = [
        torch.load(Path(folder) / "train" / "tiny" / "checkpoints" / "step_0000006.pt", weights_only=True)["student"]
        for folder in (fresh, alone)
    ]
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    losses = [
        [(record["loss"], record["ibot"]) for record in train.read_metrics(folder / "train" / "tiny" / "metrics.jsonl")]
        for folder in (fresh, alone)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_losses_are_named_in_full():
    kinds = ["10x-40x", "standalone"]

    def names(**changes):
        return loss_names(RunConfig(**fakes.tiny_run(**changes)), kinds)

    plain = names(method="mad")
    assert len(plain) == 3 and not any("also sees" in name or "iBOT" in name for name in plain)
    full = names(method="mad_global", ibot=SHARED, centring="ema", spread="kde")
    assert "also sees these views of the parent" in full[0] and "EMA" in full[0]
    assert "views of parents and global crops lose 10% to 50%" in full[2] and "shared head" in full[2]
    assert full[3].startswith("KDE")
    changed = names(method="mad_global", targets="cell", parent_weight=0.5)[0]
    assert "4 children each against its own place in 2 views of their parent" in changed and changed.endswith(
        "(weight 0.5)"
    )
    for pairs, words in (
        ("aligned", "4 children against 2 views of their parent (10x-40x)"),
        ("shuffled", "4 children of another parent of the slide against 2 views of this parent (10x-40x)"),
        ("interpolated", "4 children, cut from their parent and enlarged, against 2 views of their parent (10x-40x)"),
        ("same", "4 views of one tile, a parent or a child, against 2 views of the same tile (10x-40x)"),
    ):
        assert names(method="mad", pairs=pairs)[0].endswith(words)
    assert "one tile of each pair 10x-40x, standalone" in names(method="dinov2")[0]
    assert "every tile of a pair 10x-40x, standalone" in names(method="dinov2", pair_tiles="all")[0]
    only_crops = names(method="mad", ibot=IBOT)[2]
    assert "parents" not in only_crops and "K = 12" in only_crops


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="mad_global"):
        RunConfig(**fakes.tiny_run(ibot=IBOT, mix={"10x-40x": 1}))
    convnet = {"model": "test_efficientnet_gn", "pooling": "avg"}
    for changes, words in (({"ibot": IBOT}, "no patch tokens"), ({"drop_path": 0.2}, "no plain transformer blocks")):
        run = RunConfig(**fakes.tiny_run(backbone=convnet, **changes))
        with pytest.raises(MadError, match=words):
            loop.build_networks(run, fakes.TILE_PX, 0)
