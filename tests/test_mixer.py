"""The region mixer against a float64 reference token by token; what it must not see, it does not see."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_regions import grid_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from mad.files import MadError, read_json, write_json
from mad.models.mixer import Mixer, MixerShape, RegionBatch, alibi_slopes, load_mixer, pad_regions, save_mixer
from mad.tiles.pyramid import Ladder, parent, parse_tile_id
from mad.tiles.regions import region_table

SHAPE = MixerShape(
    dim=7,
    magnifications=[2.5, 10.0, 40.0],
    unit_um=4.0,
    width=12,
    depth=2,
    heads=3,
    attention="region",
    pooling="token",
)
LADDER = Ladder((2.5, 10.0, 40.0))


def make(**changes: object) -> Mixer:
    torch.manual_seed(0)
    mixer = Mixer(replace(SHAPE, **changes))  # type: ignore[arg-type]
    for parameter in mixer.parameters():  # far from the small initial ones, so that nothing is nearly zero
        torch.nn.init.normal_(parameter, std=0.4)
    mixer.mean.normal_()
    mixer.std.uniform_(0.5, 2)
    return mixer.eval()


def region(seed: int, blank: float = 0.7) -> tuple[tuple[Tensor, Tensor, Tensor], list[str]]:
    """The tiles of one region, and their ids; a share of them blank."""
    table = region_table(grid_of(LADDER, 1, 1, 0.25, blank, seed), LADDER, 16)
    where = torch.tensor(table[["x_um", "y_um", "side_um"]].to_numpy(), dtype=torch.float32)
    embeddings = torch.randn(len(table), 7, generator=torch.Generator().manual_seed(seed))
    return (embeddings, torch.tensor(table["scale"].to_numpy()), where), list(table["tile_id"])


def batch_of(*seeds: int) -> RegionBatch:
    return pad_regions([region(seed)[0] for seed in seeds])


def reference(mixer: Mixer, tiles: tuple[Tensor, Tensor, Tensor], hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [1 + n seen, W] and predictions of the hidden tiles, in float64, query by query."""
    w = {name: tensor.detach().double().numpy() for name, tensor in mixer.state_dict().items()}
    shape, (embeddings, scale, where) = mixer.shape, (part.double().numpy() for part in tiles)
    scale, size = scale.astype(int), shape.width // shape.heads

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(name: str, query: np.ndarray, key: np.ndarray, places: list, others: list) -> np.ndarray:
        q, kv = linear(f"{name}.query", query), linear(f"{name}.key_value", key)
        k, v = kv[:, : shape.width], kv[:, shape.width :]
        out = np.zeros_like(q)
        for a, head in np.ndindex(len(q), shape.heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.zeros(len(k))
            for b in range(len(k)):
                apart = 0.0 if places[a] is None or others[b] is None else np.hypot(*(places[a] - others[b]))
                scores[b] = (
                    q[a, part] @ k[b, part] / np.sqrt(size)
                    - 2 ** (-8 * (head + 1) / shape.heads) * apart / shape.unit_um
                )
            share = np.exp(scores - scores.max())
            out[a, part] = share / share.sum() @ v[:, part]
        return linear(f"{name}.out", out)

    def block(
        name: str, x: np.ndarray, places: list, key: np.ndarray | None = None, others: list | None = None
    ) -> np.ndarray:
        normed = norm(f"{name}.norm", x)
        x = x + attend(f"{name}.attention", normed, normed if key is None else key, places, others or places)
        inner = linear(f"{name}.mlp.0", norm(f"{name}.norm_mlp", x))
        gelu = torch.nn.functional.gelu(torch.from_numpy(inner)).numpy()
        return x + linear(f"{name}.mlp.2", gelu)

    tokens = (
        norm("embed_norm", linear("embed", (embeddings - w["mean"][scale]) / w["std"][scale]))
        + w["magnification"][scale]
    )
    x = np.concatenate([w["region"][None], tokens[~hidden]])
    seen: list = [None, *where[~hidden, :2]]
    for n in range(shape.depth):
        x = block(f"blocks.{n}", x, seen)
    x = norm("norm", x)
    asked = norm(
        "decoder_norm",
        block("decoder", w["mask"] + w["magnification"][scale[hidden]], list(where[hidden, :2]), x, seen),
    )
    return x, np.array([linear(f"outputs.{s}", token) for s, token in zip(scale[hidden], asked, strict=True)])


def test_the_mixer_is_its_reference() -> None:
    """Three regions of different sizes in one padded batch, each against the reference alone."""
    mixer, seeds = make(), (1, 2, 3)
    batch = batch_of(*seeds)
    assert len({int(n) for n in batch.present.sum(1)}) == 3
    hidden = torch.rand(batch.present.shape, generator=torch.Generator().manual_seed(4)) < 0.6
    vectors, predicted, asked = mixer.reconstruct(batch, hidden)
    _, tokens = mixer(batch)
    done = 0
    for n, seed in enumerate(seeds):
        tiles, _ = region(seed)
        size = len(tiles[1])
        expected, outputs = reference(mixer, tiles, hidden[n, :size].numpy())
        mine = predicted[done : done + len(outputs)].detach().numpy()
        done += len(outputs)
        assert np.abs(mine - outputs).max() < 1e-4 * np.abs(outputs).max()
        assert np.abs(vectors[n].detach().numpy() - expected[0]).max() < 1e-4
        whole, _ = reference(mixer, tiles, np.zeros(size, bool))
        assert np.abs(tokens[n, :size].detach().numpy() - whole[1:]).max() < 1e-4
    assert done == len(predicted) == int(asked.present.sum())


def test_hidden_tiles_are_not_seen() -> None:
    """Other numbers in the hidden tiles (and in the padding) change neither region vectors nor predictions."""
    mixer, batch = make(), batch_of(1, 2)
    hidden = torch.rand(batch.present.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    first = mixer.reconstruct(batch, hidden)
    unseen = (hidden | ~batch.present)[..., None]
    second = mixer.reconstruct(replace(batch, embeddings=torch.where(unseen, 1e3, batch.embeddings)), hidden)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    seen = mixer.reconstruct(replace(batch, embeddings=batch.embeddings + 1.0), hidden)
    assert not torch.allclose(first[1], seen[1])


def test_bias_is_slope_times_micrometres() -> None:
    mixer = make()
    query = torch.tensor([[[0.0, 0.0, 4.0], [30.0, 40.0, 16.0]]])
    key = torch.tensor([[[0.0, 0.0, 4.0], [60.0, 80.0, 64.0], [0.0, 0.0, 4.0]]])
    bias = mixer.bias(query, key, torch.tensor([[True, True, False]]))
    distance = torch.tensor([[0.0, 0.0, 100.0], [0.0, 50.0, 50.0]]) / 4.0  # the region token first
    expected = -alibi_slopes(3)[:, None, None] * distance
    assert torch.allclose(bias[0, :, :, :3], expected) and (bias[0, :, :, 3] == -torch.inf).all()
    assert torch.allclose(alibi_slopes(8), torch.tensor([2.0**-n for n in range(1, 9)]))


def test_place_attention_is_kinship_in_the_tile_ids() -> None:
    """`attention: place`: a tile sees itself, its ancestors and its descendants, by their ids, and nothing of others."""
    tiles, ids = region(5, blank=0.3)
    batch, mixer = pad_regions([tiles]), make(attention="place", depth=1)

    def ancestors(name: str) -> set[tuple[int, ...]]:
        index: tuple[int, ...] | None = parse_tile_id(name)[1]
        found = set()
        while index is not None:
            found.add(index)
            index = parent(index)
        return found

    index = [parse_tile_id(name)[1] for name in ids]
    kin = torch.tensor(
        [
            [a in ancestors(q) or b in ancestors(p) for a, p in zip(index, ids, strict=True)]
            for b, q in zip(index, ids, strict=True)
        ]
    )
    assert torch.equal(mixer.bias(batch.where, batch.where, batch.present)[0, 0, :, 1:].isfinite(), kin)
    _, before = mixer(batch)
    for changed in range(0, len(ids), 40):
        other = batch.embeddings.clone()
        other[0, changed] += 1.0
        region_vector, after = mixer(replace(batch, embeddings=other))
        moved = (before - after).abs().amax(-1)[0] > 0
        assert torch.equal(moved, kin[changed])
    assert region_vector.isfinite().all()


def test_order_and_place_on_the_slide_do_not_matter() -> None:
    mixer, (tiles, _) = make(), region(6)
    order = torch.randperm(len(tiles[1]), generator=torch.Generator().manual_seed(0))
    vector, tokens = mixer(pad_regions([tiles]))
    moved = tiles[0][order], tiles[1][order], tiles[2][order] + torch.tensor([512.0, 64.0, 0.0])
    other, others = mixer(pad_regions([moved]))  # type: ignore[list-item]
    assert torch.allclose(vector, other, atol=1e-5) and torch.allclose(tokens[:, order], others, atol=1e-5)


def test_mean_pooling_is_the_mean_of_the_tiles() -> None:
    mixer, batch = make(pooling="mean"), batch_of(1, 3)
    vectors, tokens = mixer(batch)
    for n in range(2):
        assert torch.allclose(vectors[n], tokens[n][batch.present[n]].mean(0), atol=1e-6)


def test_a_saved_mixer_is_the_same_and_nothing_is_executed(tmp_path: Path) -> None:
    mixer, batch = make(), batch_of(1, 2)
    sha256 = save_mixer(mixer, tmp_path, {"steps": 3})
    loaded = load_mixer(tmp_path)
    assert loaded.shape == mixer.shape and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(mixer(batch), loaded(batch), strict=True))
    assert read_json(tmp_path / "provenance.json") == {"steps": 3, "weights_sha256": sha256}
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "provenance.json"}

    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if name != "mask"}, tmp_path / "model.safetensors")
    with pytest.raises(MadError, match="not of one mixer"):
        load_mixer(tmp_path)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), "colour": 1})
    with pytest.raises(MadError, match="not of one mixer"):
        load_mixer(tmp_path)
    with pytest.raises(MadError, match="no config.json"):
        load_mixer(tmp_path / "nowhere")
