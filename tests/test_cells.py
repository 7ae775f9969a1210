"""Parts of a tile: where children lie in their parent's tokens, and what the backbone says of these."""

import itertools

import fakes
import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from mad.config.training import RunConfig
from mad.config.views import PhotometricConfig
from mad.files import MadError
from mad.models.cells import cell_embeddings, feature_grid, token_grid
from mad.stages import train
from mad.training import loop, views
from mad.training.cells import cell_weights, check_grid, needed_grid
from mad.training.data import TrainingSet, batches
from mad.training.index import load_index
from mad.training.objective import Numerics, step_loss, teach
from mad.training.records import read_metrics

PLAIN = PhotometricConfig(jitter=0, grayscale=0, blur=[0, 0, 0], solarize=0)
VIT = {"patch_size": 8, "img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 0}
MODELS = {
    "convolutional": ("test_efficientnet_gn", {"num_classes": 0}),
    "norm behind the pooling": ("convnext_atto", {"num_classes": 0, "depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}),
    "channels last": ("swin_tiny_patch4_window7_224", {
        "num_classes": 0, "img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2),
    }),
    "ViT, average pooling": ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    fakes.write_cohort(folder)
    return folder


@given(st.data())
def test_shares_equal_those_of_a_fine_raster(data):
    steps = tuple(data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=2)))
    path = tuple(data.draw(st.integers(0, step**2 - 1)) for step in steps)
    grid = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    fine = np.prod(steps) * np.array(grid)  # each of its cells is in one token and inside or outside of the tile
    inside = np.ones((1, 1), bool)
    for place, step in reversed(list(zip(path, steps, strict=True))):
        cell = np.zeros((step, step), bool)
        cell.flat[place] = True
        inside = np.kron(cell, inside)
    inside = np.kron(inside, np.ones(grid, bool)).reshape(fine)
    expected = inside.reshape(grid[0], fine[0] // grid[0], grid[1], fine[1] // grid[1]).sum((1, 3)) / inside.sum()
    np.testing.assert_allclose(cell_weights(path, steps, grid), expected, atol=1e-6)


def test_a_path_that_ends_early_is_a_larger_tile():
    assert (cell_weights((5,), (4, 4), (4, 4)) == np.eye(16)[5].reshape(4, 4)).all()
    assert cell_weights((), (4,), (3, 3)) == pytest.approx(np.full((3, 3), 1 / 9))


@given(st.integers(0, 10_000))
def test_cells_are_turned_as_the_parent_is(seed):
    """A parent of sixteen colours: in each view the tokens of child k show colour k."""
    colours = np.arange(16, dtype=np.uint8) * 16
    parent = np.kron(colours.reshape(4, 4), np.ones((8, 8), np.uint8))[:, :, None].repeat(3, 2)
    shown = [3, 14, 6, 9]
    cells = [cell_weights((k,), (4,), (4, 4)) for k in shown]
    made = views.pair_views(parent, [parent] * 4, PLAIN, np.random.default_rng(seed), (), cells)
    assert made.cells.shape == (2, 4, 16) and made.cells.dtype == np.float32
    for view, weights in zip(made.teacher, made.cells, strict=True):
        tokens = view[::8, ::8, 0].ravel().astype(float)
        np.testing.assert_allclose(weights @ tokens, colours[shown])


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_image_as_one_part_is_its_average_pooling(name):
    torch.manual_seed(0)
    model, args = MODELS[name]
    side = args.get("img_size", 64)
    backbone, images = timm.create_model(model, **args).eval(), torch.randn(3, 3, side, side)
    rows, columns = feature_grid(backbone, side)
    with torch.no_grad():
        features = backbone.forward_features(images)
        assert token_grid(backbone, features, side).shape[1:3] == (rows, columns)
        uniform = torch.full((3, 1, rows * columns), 1 / (rows * columns))
        torch.testing.assert_close(cell_embeddings(backbone, features, uniform), backbone(images))
        corners = torch.zeros(3, 2, rows * columns)
        corners[:, 0, 0] = corners[:, 1, -1] = 1
        one, two = cell_embeddings(backbone, features, corners).unflatten(0, (3, 2)).unbind(1)
        assert not torch.allclose(one, two)
        tokens = token_grid(backbone, features, side)
        if "ViT" in name:
            torch.testing.assert_close(one, tokens[:, 0, 0])
            torch.testing.assert_close(two, tokens[:, -1, -1])


@pytest.mark.parametrize("pairs", ["aligned", "shuffled", "interpolated"])
def test_children_have_the_colours_of_the_tokens_that_they_answer_to(results, pairs):
    """A parent is its sixteen children, shrunk: however it was turned, a child's mean colour is that of its cell."""
    changes = {"targets": "cell", "pairs": pairs, "mix": {"10x-40x": 1}, "photometric": PLAIN.model_dump()}
    run = RunConfig(**fakes.tiny_run(**changes))
    index = load_index(results / "shard", "train", run.children)
    data = TrainingSet(index, run, fakes.TILE_PX, 16, 0, (4, 4))
    (group,) = next(batches(data, start=0, rank=0, world=1, workers=0)).groups
    torch.testing.assert_close(group.cells.sum(-1), torch.ones(4, 2, 4))
    tokens = (
        group.teacher.double().unflatten(2, (4, 8)).unflatten(4, (4, 8)).mean((3, 5)).flatten(2, 3)
    )  # [B, T, 16, 3]
    of_cells = group.cells.double() @ tokens
    of_children = group.student.double().mean((2, 3))
    apart = (of_cells - of_children[:, None]).abs().mean()
    assert apart < 1 if pairs != "shuffled" else apart > 10


def test_three_magnifications(results):
    changes = {"targets": "cell", "children": 2, "mix": {"2.5x-10x-40x": 1}}
    run = RunConfig(**fakes.tiny_run(**changes))
    index = load_index(results / "shard", "train", run.children)
    (group,) = next(
        batches(TrainingSet(index, run, fakes.TILE_PX, 16, 0, (16, 16)), start=0, rank=0, world=1, workers=0)
    ).groups
    tokens = (group.cells > 0).sum(-1)  # a child has 4 x 4 of 16 x 16 tokens, a grandchild one
    assert (tokens[..., 0] == 16).all() and (tokens[..., 1] == 1).all()
    assert ((group.cells > 0).all(2).sum(-1) == 1).all()  # inside of it


@pytest.mark.parametrize("loader", ["indexed", "stream"])
@pytest.mark.parametrize("method", ["mad", "mad_global"])
def test_runs_train(results, tmp_path, loader, method):
    (tmp_path / "shard").symlink_to(results / "shard")
    run = fakes.tiny_run(method=method, targets="cell", loader=loader, shuffle_buffer=4)
    train.run(fakes.tiny_config(tmp_path, run), run["name"])
    losses = [record["dino"] for record in read_metrics(tmp_path / "train" / run["name"] / "metrics.jsonl")]
    assert len(losses) == run["steps"] and np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "dinov2", "targets": "cell"}, "children under a parent"),
        ({"targets": "cell", "pairs": "same"}, "children under a parent"),
        ({"parent_weight": 2.0}, "changes nothing under method 'mad'"),
    ],
)
def test_what_has_no_meaning_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        RunConfig(**fakes.tiny_run(**changes))


def test_a_backbone_without_parts_is_refused():
    class Flat(torch.nn.Module):
        num_features = 4

        def forward_features(self, images):
            return images.flatten(1)[:, :4]

    assert feature_grid(Flat(), 32) is None
    run = RunConfig(**fakes.tiny_run(targets="cell"))
    with pytest.raises(MadError, match="neither patch tokens nor a feature map"):
        needed_grid(run, Flat(), 32)


def test_tokens_that_do_not_tell_children_apart_are_refused(results, tmp_path):
    check_grid((4, 4), ["2.5x-10x", "10x-40x", "2.5x-10x-40x", "standalone"], "runs.mad.targets")
    (tmp_path / "shard").symlink_to(results / "shard")
    run = fakes.tiny_run(targets="cell", backbone={"model": "test_efficientnet_gn", "pooling": "avg"})
    with pytest.raises(MadError, match=r"1 x 1 tokens do not tell the 4 x 4 children of 2\.5x-10x apart"):
        train.run(fakes.tiny_config(tmp_path, run), "tiny")


def test_a_path_beyond_the_steps_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        cell_weights((1, 2), (4,), (4, 4))


@pytest.mark.parametrize("ibot", [0.0, 1.0])
def test_passes_and_mixed_batches_change_no_target(results, ibot):
    """Targets of two passes together are those of one; a batch of all kinds gives each sample what a batch of its kind has."""
    run = RunConfig(
        **fakes.tiny_run(method="mad_global", targets="cell", mix_mode="within", batch=8, ibot={"weight": ibot})
    )
    index = load_index(results / "shard", "train", run.children)
    student, teacher = loop.build_networks(run, fakes.TILE_PX, 0)
    data = TrainingSet(index, run, fakes.TILE_PX, 16, 0, (4, 4))
    numerics = Numerics((0.5,) * 3, (0.5,) * 3, torch.device("cpu"), torch.float32)
    found = []
    for passes in (1, 2):
        parts = list(itertools.islice(batches(data, start=0, rank=0, world=1, workers=0, passes=passes), passes))
        taught = teach(student, teacher, parts, run, numerics, 0.05)
        assert {group.kind for part in parts for group in part.groups} == {"global_pair", "multicrop"}
        losses = [
            step_loss(student, teacher, part, run, numerics, 0.05, one) for part, one in zip(parts, taught, strict=True)
        ]
        found.append(
            (sum(float(loss.dino.detach()) for loss in losses), sum(float(loss.ibot.detach()) for loss in losses))
        )
    assert found[0] == pytest.approx([value / 2 for value in found[1]], rel=1e-5)
