"""The region mixer of MMA: embeddings of the tiles of a region, at several magnifications, in the context of one another.

    token   = LayerNorm(W (e - mean_s) / std_s) + u_s              of a tile with embedding e at magnification s
    encoder = pre-norm transformer over [region token, tokens that are seen]
    bias    = -m_h |c_q - c_k| / unit                              on the attention of head h, m_h = 2^(-8 h / H)
    decoder = one cross-attention layer from queries v + u_s, with the same bias, to the encoder's output; one linear output per s

c are tile centres in micrometres, in one frame for all magnifications, and `unit` is the side of the finest tile: ALiBi (Press
et al. 2022) in two dimensions. To and from the region token the bias is zero. Hidden tiles are absent, not replaced: the encoder
never sees them. What of this is the paper's and what is ours: docs/mma.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mad.files import MadError, Pathlike, read_json, sha256_file, write_json
from mad.models.export import WEIGHTS
from mad.models.tensors import read_tensors, write_tensors


@dataclass(frozen=True)
class MixerShape:
    """What, besides the weights, a mixer is: `config.json` of its folder."""

    dim: int
    """Length of the tile encoder's embeddings."""
    magnifications: list[float]
    """Coarsest first."""
    unit_um: float
    """Side of a tile at the finest magnification."""
    width: int
    depth: int
    heads: int
    attention: str
    """`region` or `place`."""
    pooling: str
    """`token` or `mean`."""


@dataclass
class RegionBatch:
    """Tiles of B regions, padded to the N of the largest; `present` tells the tiles from the padding."""

    embeddings: Tensor  # [B, N, D]
    scale: Tensor  # [B, N] int64: number of the magnification, 0 the coarsest
    where: Tensor  # [B, N, 3]: centre x, y and side, in um
    present: Tensor  # [B, N] bool

    def select(self, wanted: Tensor) -> RegionBatch:
        """The tiles that are both present and `wanted` [B, N], in their order, padded anew."""
        wanted = wanted & self.present
        size = int(wanted.sum(1).max())
        order = wanted.int().argsort(dim=1, descending=True, stable=True)[:, :size]

        def take(x: Tensor) -> Tensor:
            return x.gather(1, order.reshape(*order.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))

        return RegionBatch(take(self.embeddings), take(self.scale), take(self.where), take(wanted))

    def to(self, device: torch.device) -> RegionBatch:
        """The same on a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class Attention(nn.Module):
    """Multi-head attention with an additive bias [B, H, Q, K], -inf where a query must not look."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def forward(self, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        """[B, Q, W] and [B, K, W] to [B, Q, W]."""
        q = self.query(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(key).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer layer; with `key` it attends to those instead of its own tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, bias: Tensor, key: Tensor | None = None) -> Tensor:
        """[B, Q, W] to [B, Q, W]; `key` [B, K, W] is normalised already."""
        normed = self.norm(x)
        x = x + self.attention(normed, normed if key is None else key, bias)
        return x + self.mlp(self.norm_mlp(x))


class Mixer(nn.Module):
    """Regions to contextual tokens, and hidden tiles from the seen ones. `mean` and `std` [S, D] are the train split's."""

    mean: Tensor
    std: Tensor
    slopes: Tensor

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        self.shape = shape
        scales, width = len(shape.magnifications), shape.width
        self.register_buffer("mean", torch.zeros(scales, shape.dim))
        self.register_buffer("std", torch.ones(scales, shape.dim))
        self.register_buffer("slopes", alibi_slopes(shape.heads), persistent=False)
        self.embed, self.embed_norm = nn.Linear(shape.dim, width), nn.LayerNorm(width)
        self.magnification = nn.Parameter(torch.empty(scales, width))
        self.region = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(Block(width, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(width)
        self.mask = nn.Parameter(torch.empty(width))
        self.decoder, self.decoder_norm = Block(width, shape.heads), nn.LayerNorm(width)
        self.outputs = nn.ModuleList(nn.Linear(width, shape.dim) for _ in range(scales))
        for parameter in (self.region, self.mask, *(p for p in self.parameters() if p.ndim > 1)):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, batch: RegionBatch) -> tuple[Tensor, Tensor]:
        """Regions to one vector each [B, W] and the contextual tokens of their tiles [B, N, W] (of padding: meaningless)."""
        x = self.encode(batch)
        return self.pool(x, batch.present), x[:, 1:]

    def reconstruct(self, batch: RegionBatch, hidden: Tensor) -> tuple[Tensor, Tensor, RegionBatch]:
        """Predict the tiles that `hidden` [B, N] takes away from the others of their region.

        Returns:
            The regions' vectors [B, W], of the seen tiles alone; predictions [M, D] of the standardised embeddings; and the
            hidden tiles as a batch, whose M present ones, region by region, the predictions are of.
        """
        seen, asked = batch.select(~hidden), batch.select(hidden)
        x = self.encode(seen)
        bias = self.bias(asked.where, seen.where, seen.present)
        tokens = self.decoder_norm(self.decoder(self.mask + self.magnification[asked.scale], bias, x))[asked.present]
        scale, predicted = asked.scale[asked.present], tokens.new_empty(len(tokens), self.shape.dim)
        for number, output in enumerate(self.outputs):
            predicted[scale == number] = output(tokens[scale == number]).to(predicted.dtype)
        return self.pool(x, seen.present), predicted, asked

    def standardise(self, batch: RegionBatch) -> Tensor:
        """Embeddings [B, N, D] less the mean of their magnification, over its standard deviation."""
        return (batch.embeddings - self.mean[batch.scale]) / self.std[batch.scale]

    def encode(self, batch: RegionBatch) -> Tensor:
        """Tokens [B, 1 + N, W], the region token first."""
        tokens = self.embed_norm(self.embed(self.standardise(batch))) + self.magnification[batch.scale]
        x = torch.cat([self.region.expand(len(tokens), 1, -1), tokens], dim=1)
        tiles = self.bias(batch.where, batch.where, batch.present)
        absent = F.pad(~batch.present, (1, 0))[:, None, None].expand(-1, self.shape.heads, -1, -1)
        region = tiles.new_zeros(absent.shape).masked_fill(absent, -torch.inf)
        if self.shape.attention == "place":
            tiles[..., 0] = -torch.inf  # it sees all places, and would tell each of the others
        bias = torch.cat([region, tiles], dim=2)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)

    def pool(self, x: Tensor, present: Tensor) -> Tensor:
        """The vector of each region [B, W] from its tokens [B, 1 + N, W]: the region token, or the mean of its tiles'."""
        if self.shape.pooling == "token":
            return x[:, 0]
        shares = present / present.sum(1, keepdim=True).clamp_min(1)
        return torch.einsum("bn,bnw->bw", shares.to(x.dtype), x[:, 1:])

    def bias(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        """The bias [B, H, Q, 1 + K] of tiles at `query` [B, Q, 3] on the region token and the `present` tiles at `key` [B, K, 3].

        Under `attention: place` tiles that do not cover one another are hidden from one another.
        """
        apart = query[:, :, None, :2] - key[:, None, :, :2]  # [B, Q, K, 2]
        bias = -self.slopes[:, None, None] * (apart.norm(dim=-1) / self.shape.unit_um)[:, None]
        hidden = ~present[:, None, :]
        if self.shape.attention == "place":
            larger = torch.maximum(query[:, :, None, 2], key[:, None, :, 2])
            hidden = hidden | (apart.abs().amax(-1) >= larger / 2)
        return F.pad(bias.masked_fill(hidden[:, None], -torch.inf), (1, 0))


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head [H]: 2^(-8 h / H), h = 1..H (Press et al. 2022, §3)."""
    return 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)


def save_mixer(mixer: Mixer, folder: Pathlike, provenance: dict[str, Any]) -> str:
    """Write config.json, model.safetensors and, last, provenance.json; returns the SHA-256 of the weights."""
    folder = Path(folder)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in mixer.state_dict().items()
    }
    write_json(folder / "config.json", asdict(mixer.shape))
    write_tensors(folder / WEIGHTS, tensors)
    sha256 = sha256_file(folder / WEIGHTS)
    write_json(folder / "provenance.json", {**provenance, "weights_sha256": sha256})
    return sha256


def load_mixer(folder: Pathlike) -> Mixer:
    """The mixer in `mix/{name}/mixer/`, in evaluation mode; nothing in the folder is executed.

    Raises:
        MadError: the folder lacks a file, or the weights are not of the shape that config.json tells.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise MadError(f"{folder}: no config.json of a mixer; run `mad mix NAME` first")
    try:
        mixer = Mixer(MixerShape(**read_json(folder / "config.json")))
        mixer.load_state_dict(read_tensors(folder / WEIGHTS))
    except (TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[-1].strip()
        raise MadError(f"{folder}: config.json and {WEIGHTS} are not of one mixer ({reason}); make it anew") from None
    return mixer.eval()


def pad_regions(regions: Sequence[tuple[Tensor, Tensor, Tensor]]) -> RegionBatch:
    """A batch from regions of n tiles each: embeddings [n, D], scale [n], where [n, 3]."""
    sizes = torch.tensor([len(scale) for _, scale, _ in regions])
    embeddings, scale, where = (
        nn.utils.rnn.pad_sequence(list(column), batch_first=True) for column in zip(*regions, strict=True)
    )
    return RegionBatch(embeddings, scale, where, present=torch.arange(int(sizes.max())) < sizes[:, None])
