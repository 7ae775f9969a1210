"""Tokens of a region mixer that learns, from the frozen embeddings of a slide's tiles (MMA; `mad.models.mixer`).

A token is what the other tiles of its region make of it, so a region is mixed whole or not at all: a training step draws regions,
and of their tokens those that the head sees. What is ours here: docs/mma.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mad.config.biomarkers import FinetuneConfig
from mad.evaluation.bags import Bag, Scaling
from mad.evaluation.learned_tokens import LearnedTokens
from mad.evaluation.tokens import EVERY, Places
from mad.models.mixer import Mixer
from mad.training.region_data import Places as Regions
from mad.training.region_data import SlideRegions, read_batch


class MixedTokens(LearnedTokens):
    """Contextual tokens of bags that hold their `regions`."""

    learner = "mixer"
    network: Mixer

    def __init__(self, scaling: Scaling, device: str, mixer: Mixer, config: FinetuneConfig) -> None:
        """`mixer` is copied."""
        super().__init__(scaling, device, mixer, layers_of(mixer), config)

    def draw(self, rng: np.random.Generator, bag: Bag, most: int | None) -> Places:
        """`most` tokens of as few regions as hold them, these taken in random order; of a mixer that stays as it is, any tokens."""
        if most is None or len(bag) <= most or not self.learning:
            return super().draw(rng, bag, most)
        _, region, _ = regions_of(bag)
        numbers, sizes = np.unique(region, return_counts=True)
        order = rng.permutation(len(numbers))
        enough = int(np.searchsorted(sizes[order].cumsum(), most)) + 1
        return rng.choice(np.flatnonzero(np.isin(region, numbers[order[:enough]])), most, replace=False)

    def vectors(self, bags: Sequence[Bag], places: Sequence[Places]) -> Tensor:
        regions: list[tuple[SlideRegions, int]] = []
        wanted, before = [], 0
        for bag, some in zip(bags, places, strict=True):
            slide, region, place = regions_of(bag, some)
            numbers, which = np.unique(region, return_inverse=True)
            sizes = 1 + np.diff(slide.bounds)[numbers]
            wanted.append(before + (sizes.cumsum() - sizes)[which] + place)
            regions += [(slide, int(number)) for number in numbers]
            before += int(sizes.sum())
        tokens = self.passed(self._mix, passes(regions, self._config.pass_tiles))
        return tokens[torch.from_numpy(np.concatenate(wanted)).to(self.device)]

    def _mix(self, regions: Regions) -> Tensor:
        """All tokens of some regions [n, W], one after the other, each region's own first."""
        batch = read_batch(regions).to(self.network.mean.device)
        own, tokens = self.network(batch)
        return torch.cat([own[:, None], tokens], dim=1)[F.pad(batch.present, (1, 0), value=True)].float()


def layers_of(mixer: Mixer) -> dict[str, int]:
    """Depth of each parameter that tokens depend on: 0 before the blocks, 1..L; the final norm counts to the last block."""
    first = ("embed.", "embed_norm.", "magnification", "region")
    layers = {name: 0 for name, _ in mixer.named_parameters() if name.startswith(first)}
    for number, block in enumerate(mixer.blocks, start=1):
        layers |= {f"blocks.{number - 1}.{name}": number for name, _ in block.named_parameters()}
    return layers | {f"norm.{name}": len(mixer.blocks) for name, _ in mixer.norm.named_parameters()}


def regions_of(bag: Bag, places: Places = EVERY) -> tuple[SlideRegions, NDArray[np.int64], NDArray[np.int64]]:
    """The regions of a bag; for some places of it the region's number [m], and the token's in the region [m], 0 its own."""
    slide, rows = bag.regions, bag.rows[places]
    assert slide is not None
    first = slide.bounds[:-1] + np.arange(len(slide))
    region = np.searchsorted(first, rows, side="right") - 1
    return slide, region, rows - first[region]


def passes(regions: Regions, tiles: int) -> list[Regions]:
    """The regions, in their order, in groups of one forward pass: so many tiles with the padding, or a single region."""
    groups: list[list[tuple[SlideRegions, int]]] = []
    largest = 0
    for slide, number in regions:
        size = int(slide.bounds[number + 1] - slide.bounds[number])
        if groups and max(largest, size) * (len(groups[-1]) + 1) <= tiles:
            groups[-1].append((slide, number))
            largest = max(largest, size)
        else:
            groups.append([(slide, number)])
            largest = size
    return list(groups)
