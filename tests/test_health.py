"""Health of a training: what the figures say of embeddings whose state is known, the held-out set, and the warnings."""

import math

import fakes
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

from mad.config.training import RunConfig
from mad.files import MadError, read_json, write_parquet
from mad.stages import train
from mad.training import loop
from mad.training.health import (
    FARTHEST_APART,
    check_health,
    choose_health_set,
    find_warnings,
    knn_macro_f1,
    scale_separation,
)
from mad.training.index import load_index
from mad.training.objective import Numerics
from mad.training.records import read_metrics

HEALTHY = {"rankme": 40.0, "scale_separation": 1.0, "retrieval_at_1": 0.5, "pairs": 80}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    fakes.write_cohort(folder)
    return folder


def normal(n, d, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)))


def test_the_separation_is_the_distance_over_the_spread_within():
    coarse, fine = normal(4000, 16), normal(4000, 16, 1)
    fine[:, 3] += 2.5
    assert scale_separation(coarse, fine) == pytest.approx(2.5, abs=0.1)
    turn = torch.linalg.qr(normal(16, 16, 2)).Q
    assert scale_separation(7 * coarse @ turn + 1, 7 * fine @ turn + 1) == pytest.approx(scale_separation(coarse, fine))


def test_alike_magnifications_are_not_apart_in_many_dimensions():
    """With means of the same tiles that the spread is of, the distance would be sqrt(2 D / N) = 3.5 here."""
    found = [scale_separation(normal(64, 384, seed), normal(64, 384, seed + 100)) for seed in range(20)]
    assert abs(np.mean(found)) < 0.15 and max(map(abs, found)) < 1


def test_a_threshold_midway_tells_the_share_that_the_distance_promises():
    coarse, fine = normal(20000, 4), normal(20000, 4, 1)
    fine[:, 0] += FARTHEST_APART
    midway = (coarse.mean(0) + fine.mean(0))[0] / 2
    right = ((coarse[:, 0] < midway).double().mean() + (fine[:, 0] > midway).double().mean()) / 2
    promised = 0.5 * (1 + math.erf(scale_separation(coarse, fine) / 2 / math.sqrt(2)))
    assert float(right) == pytest.approx(promised, abs=0.005) and 0.92 < promised < 0.94


def test_no_separation_without_pairs_and_a_finite_one_without_spread():
    assert scale_separation(normal(3, 8), normal(3, 8, 1)) is None
    same = torch.ones(8, 4)
    assert scale_separation(same, same) == 0
    assert scale_separation(same, -same) > 1000 and math.isfinite(scale_separation(same, -same))


def reference_knn(parents, children, labels, k):
    """scikit-learn's k-NN, asked child by child with its own parent left out; no vote is tied with odd k and two classes."""
    n, predicted, truth = len(parents), [], []
    for child in range(n):
        if labels[n + child] is None:
            continue
        bank = [row for row in range(n) if row != child and labels[row] is not None]
        model = KNeighborsClassifier(k, metric="cosine").fit(parents[bank], [labels[row] for row in bank])
        predicted += list(model.predict(children[child : child + 1]))
        truth.append(labels[n + child])
    return f1_score(truth, predicted, labels=sorted(set(truth)), average="macro")


def test_knn_agrees_with_a_reference_and_never_asks_a_child_s_own_parent():
    parents, children = normal(30, 5), normal(30, 5, 1)
    rng = np.random.default_rng(0)
    labels = [None if rng.random() < 0.2 else "ab"[rng.integers(2)] for _ in range(60)]
    cosines = F.normalize(parents, dim=1) @ F.normalize(children, dim=1).T
    assert knn_macro_f1(cosines, labels, k=5) == pytest.approx(reference_knn(parents, children, labels, 5))
    # each child lies on its own parent and its class is found under no other: alone its parent could tell
    alone = [str(n) for n in range(8)] * 2
    assert knn_macro_f1(torch.eye(8), alone, k=1) == 0.0


def test_knn_finds_classes_and_is_null_without_labels():
    centres = torch.eye(4).repeat_interleave(5, dim=0)
    labels = [name for name in "abcd" for _ in range(5)] * 2
    assert knn_macro_f1(centres @ centres.T, labels, k=3) == 1.0
    for nothing in ([], [None] * 40, ["a"] + [None] * 38 + ["a"], ["a"] * 20 + [None] * 20):
        assert knn_macro_f1(centres @ centres.T, nothing) is None


@pytest.mark.parametrize(
    ("loss", "change", "name"),
    [
        (4.85, {}, "uniform collapse"),
        (3.0, {"rankme": 4.0}, "rank collapse"),
        (3.0, {"rankme": 2.1, "pairs": 5}, "rank collapse"),
        (3.0, {"scale_separation": 3.1, "retrieval_at_1": 4 / 80}, "scale separation"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_try(loss, change, name):
    (found,) = find_warnings(loss, 128, HEALTHY | change).items()
    assert found[0] == name and "Try " in found[1]


@pytest.mark.parametrize(
    "health",
    [
        HEALTHY,
        {},
        HEALTHY | {"scale_separation": 3.1, "retrieval_at_1": 5 / 80},  # apart, yet parents find their children
        HEALTHY | {"rankme": 7.2, "pairs": 4},  # of eight random vectors, which have no more
        HEALTHY | {"scale_separation": 2.9, "retrieval_at_1": 0.0},
        HEALTHY | {"scale_separation": None, "retrieval_at_1": 0.0},
    ],
)
def test_what_is_well_or_unknown_is_not_warned_of(health):
    assert find_warnings(4.2, 128, health) == {}


def test_the_set_is_fixed_and_parents_meet_their_own_children(results):
    splits = {name: load_index(results / "shard", name, 4) for name in ("val", "train")}
    first, second = (choose_health_set(splits, fakes.TILE_PX, 6) for _ in range(2))
    assert (first.source, first.kind) == ("val", "10x-40x")
    assert torch.equal(first.parents, second.parents) and torch.equal(first.children, second.children)
    assert len(first.tiles) == 12 and first.tiles == second.tiles
    for (slide, parent), (other, child) in zip(first.tiles[:6], first.tiles[6:], strict=True):
        assert slide == other == "S03" and child.startswith(parent.replace("_L1_", "_L2_") + "_")
    empty = load_index(results / "shard", "test", 4)
    assert choose_health_set({"val": empty, "train": splits["train"]}, fakes.TILE_PX, 6).source == "train"
    with pytest.raises(MadError, match="health"):
        choose_health_set({"val": empty}, fakes.TILE_PX, 6)


def test_few_held_out_pairs_give_way_to_those_of_training(tmp_path, results, capfd):
    """Eight pairs of the validation split are enough for who asks for eight, and too few for who asks for more."""
    splits = {name: load_index(results / "shard", name, 4) for name in ("val", "train")}
    assert choose_health_set(splits, fakes.TILE_PX, 8).source == "val" and not capfd.readouterr().err
    assert choose_health_set(splits, fakes.TILE_PX, 80).source == "train"
    assert "split 'val' has 8 of 16 pairs" in capfd.readouterr().err
    assert choose_health_set({"val": splits["val"]}, fakes.TILE_PX, 80).source == "val"
    fakes.write_slide(tmp_path, "S01", "train", 8, 0)
    fakes.write_slide(tmp_path, "S03", "val", 16, 0)
    enough = {name: load_index(tmp_path, name, 4) for name in ("val", "train")}
    assert choose_health_set(enough, fakes.TILE_PX, 80).source == "val"


def test_figures_are_those_of_the_networks_and_leave_them_as_they_are(results):
    run = RunConfig(**fakes.tiny_run())
    student, teacher = loop.build_networks(run, fakes.TILE_PX, 0)
    data = choose_health_set({"val": load_index(results / "shard", "val", 4)}, fakes.TILE_PX, 8)
    numerics = Numerics((0.5,) * 3, (0.5,) * 3, torch.device("cpu"), torch.float32)
    found = check_health(student, teacher, data, numerics, 0.1, 0.04)
    assert student.training and not teacher.training
    assert found["knn_coarse_to_fine"] is None and found["pairs"] == 8
    assert all(0 <= found[f"{name}_entropy"] <= 1 + 1e-6 for name in ("student", "teacher", "target"))
    assert 1 <= found["rankme_fine"] <= 8 and 1 <= found["rankme_coarse"] <= 8 and found["rankme"] <= 16
    assert found == check_health(student, teacher, data, numerics, 0.1, 0.04)


def test_labels_come_from_the_tile_tables_where_they_are(results, tmp_path):
    (tmp_path / "shard").symlink_to(results / "shard")
    config = fakes.tiny_config(tmp_path, fakes.tiny_run(steps=5, warmup=1))
    train.run(config, "tiny")
    (folder,) = (tmp_path / "train").iterdir()
    health = read_metrics(folder / "metrics.jsonl")[-1]["health"]
    assert health["knn_coarse_to_fine"] is None and health["scale_separation"] is not None
    ids = load_index(results / "shard", "val", 4).rows["tile_id"].unique()
    labels = [["a", "b", None][n % 3] for n in range(len(ids))]
    write_parquet(tmp_path / "tile" / "S03.parquet", pd.DataFrame({"tile_id": ids, "label": labels}))
    (folder / "encoder" / "provenance.json").unlink()
    (folder / "checkpoints" / "step_0000005.pt").unlink()
    train.run(config, "tiny")
    summary = read_json(folder / "summary.json")
    assert 0 <= summary["health"]["knn_coarse_to_fine"] <= 1
    known = dict(zip(ids, labels, strict=True))
    tiles = [("S03", str(tile)) for tile in ids] + [("S99", "S99_L0_0_0")]
    assert train.tile_labels(tmp_path / "tile", tiles) == [known[tile] for tile in ids] + [None]


def test_the_summary_counts_the_samples_that_are_drawn(tmp_path):
    """Under `shuffled` a slide's only parent has nobody to take children from."""
    for slide, split, pairs in (("S01", "train", 8), ("S02", "train", 1), ("S03", "val", 8)):
        fakes.write_slide(tmp_path / "shard", slide, split, pairs, standalone=2)
    entry = fakes.tiny_run(steps=2, warmup=1, freeze_last_layer=0, pairs="shuffled", mix={"10x-40x": 1})
    train.run(fakes.tiny_config(tmp_path, entry), "tiny")
    assert read_json(tmp_path / "train" / "tiny" / "summary.json")["samples"] == {"10x-40x": 8}
    assert "8 10x-40x samples" in (tmp_path / "train" / "tiny" / "encoder" / "README.md").read_text()
