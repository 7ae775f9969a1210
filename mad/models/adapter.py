"""The cross-scale adapter: a light residual head on the embeddings of a frozen encoder, one per magnification or one for all.

    x~ = (x - mean_m) / std_m        y = x~ + f_m(x~)        z = sqrt(D) y / ||y||

f_m is linear, or an MLP with one hidden layer, and starts at 0: the untrained adapter is the encoder, standardised. Training
looks at cosines alone and leaves lengths to chance, which a classifier would read: hence z, all of one length, that of
standardised embeddings on average; `unit: false` gives y. Neither training nor use needs an image. Own design; no paper has it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mad.files import MadError, Pathlike, read_json, sha256_file, write_json
from mad.models.tensors import read_tensors, write_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """What config.json tells."""

    dim: int
    """D, of the embeddings before and after."""
    magnifications: list[float]
    """The ladder, coarsest first."""
    scales: Literal["own", "shared"] = "own"
    hidden: int = 0
    """Width of the MLP; 0: linear."""
    unit: bool = True
    """z rather than y."""


class Adapter(nn.Module):
    """Embeddings [n, D] of tiles of one magnification to adapted embeddings [n, D], fp32.

    `mean` and `std` [S, D], S the number of magnifications, or 1 where they share one head, are set from the training tiles.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: AdapterShape) -> None:
        super().__init__()
        self.shape = shape
        count = len(shape.magnifications) if shape.scales == "own" else 1
        self.register_buffer("mean", torch.zeros(count, shape.dim))
        self.register_buffer("std", torch.ones(count, shape.dim))
        self.heads = nn.ModuleList(_residual(shape.dim, shape.hidden) for _ in range(count))

    def place(self, magnification: float) -> int:
        """Which of the heads is that of a magnification.

        Raises:
            MadError: the adapter does not know the magnification.
        """
        for place, known in enumerate(self.shape.magnifications):
            if abs(known - magnification) < 1e-6 * known:
                return place if self.shape.scales == "own" else 0
        raise MadError(
            f"the adapter was made for {self.shape.magnifications}x, not for {magnification:g}x; make it anew"
        )

    def standardise(self, x: Tensor, magnification: float) -> Tensor:
        """x~, of embeddings [n, D] of one magnification."""
        place = self.place(magnification)
        return (x - self.mean[place]) / self.std[place]

    def adapt(self, standardised: Tensor, magnification: float) -> Tensor:
        """y, of standardised embeddings [n, D] of one magnification."""
        return standardised + self.heads[self.place(magnification)](standardised)

    def forward(self, x: Tensor, magnification: float) -> Tensor:
        """z (or y), of embeddings [n, D] of one magnification."""
        y = self.adapt(self.standardise(x, magnification), magnification)
        return math.sqrt(self.shape.dim) * F.normalize(y, dim=-1) if self.shape.unit else y

    @torch.no_grad()
    def fit_moments(self, features: NDArray, magnifications: NDArray) -> None:
        """Set `mean` and `std` by embeddings [n, D] of tiles at `magnifications` [n]; a constant dimension keeps its unit.

        Raises:
            MadError: a magnification of the ladder has no tile here.
        """
        places = self.places(magnifications)
        for place in range(len(self.mean)):
            rows = features[places == place]
            if not len(rows):
                raise MadError(
                    f"no training tile at {self.shape.magnifications[place]:g}x to standardise by; look at sample.max_pairs and "
                    "sample.max_standalone, or take scales: shared"
                )
            spread = rows.std(axis=0, dtype=np.float64)
            self.mean[place] = torch.from_numpy(rows.mean(axis=0, dtype=np.float64))
            self.std[place] = torch.from_numpy(np.where(spread > 1e-6, spread, 1.0))

    def places(self, magnifications: NDArray) -> NDArray[np.int64]:
        """Which head each tile [n] takes."""
        values, index = np.unique(np.asarray(magnifications, np.float64), return_inverse=True)
        return np.array([self.place(float(value)) for value in values], np.int64)[index]

    @torch.no_grad()
    def apply_to(self, features: NDArray, magnifications: NDArray, chunk: int = 16384) -> NDArray[np.float32]:
        """Adapted embeddings float32 [n, D] of embeddings [n, D] of tiles at `magnifications` [n].

        Raises:
            MadError: they are of another dimension, or of a magnification that the adapter does not know.
        """
        if features.ndim != 2 or features.shape[1] != self.shape.dim:
            raise MadError(f"the adapter takes embeddings of {self.shape.dim} dimensions, these are {features.shape}")
        places, adapted = self.places(magnifications), np.empty(features.shape, np.float32)
        for place in np.unique(places):
            magnification = self.shape.magnifications[place]
            rows = np.flatnonzero(places == place)
            for part in np.split(rows, range(chunk, len(rows), chunk)):
                x = torch.from_numpy(np.asarray(features[part], np.float32)).to(self.mean.device)
                adapted[part] = self(x, magnification).cpu().numpy()
        return adapted


def _residual(dim: int, hidden: int) -> nn.Module:
    """f_m, which is 0 at first."""
    last = nn.Linear(hidden or dim, dim)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), last) if hidden else last


def save_adapter(adapter: Adapter, folder: Pathlike) -> str:
    """Write config.json and model.safetensors to `folder`; returns the SHA-256 of the weights. Equal weights give equal bytes."""
    folder = Path(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in adapter.state_dict().items()}
    write_json(folder / CONFIG, asdict(adapter.shape))
    write_tensors(folder / WEIGHTS, tensors)
    return sha256_file(folder / WEIGHTS)


def load_adapter(folder: Pathlike) -> Adapter:
    """The adapter in `adapt/{name}/`; nothing in the folder is executed.

    Raises:
        MadError: the folder lacks a file, or the weights are not of the shape that config.json tells.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise MadError(f"{folder}: no {CONFIG} of an adapter; run `mad adapt NAME` first")
    try:
        adapter = Adapter(AdapterShape(**read_json(folder / CONFIG)))
        adapter.load_state_dict(read_tensors(folder / WEIGHTS))
    except (TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[-1].strip()
        raise MadError(f"{folder}: {CONFIG} and {WEIGHTS} are not of one adapter ({reason}); make it anew") from None
    return adapter.eval()
