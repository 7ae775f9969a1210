"""Which tiles a sample of two or three magnifications shows: a parent with its own children, or with what a control draws.

A kind "2.5x-10x" shows a parent and `children` of its 16. A kind "2.5x-10x-40x" (tri-level) shows a 2.5x parent, half of
`children` at 10x, drawn from those of its children that are parents themselves, and for each one of its own 40x children: the
teacher sees the 2.5x parent alone, the student as many views as in a pair, and every one of them answers to the parent.

With `pairs: shuffled` the children are drawn in the same way under another parent of the same slide, kind and split. Under method
`xmag` a sample shows a parent and all of its children, row by row: nothing is drawn, and pairs that lack a child are left out.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd

from mad.config.kinds import is_triple
from mad.config.training import RunConfig
from mad.training.fields import is_whole
from mad.training.index import Index, Pairs, Triples

Places = npt.NDArray[np.int64]


class Pairing:
    """Draws tiles by the place of a sample in its kind; all randomness comes from the generator that `draw` is given.

    `usable` holds the places per kind that can be drawn at all: under `shuffled` those whose slide has another parent, under
    `xmag` those with all children. Kinds without samples are left out.
    """

    def __init__(self, index: Index, run: RunConfig) -> None:
        self.children, self.shuffled, self.whole = run.children, run.pairs == "shuffled", run.distill is not None
        self._pairs = index.pairs
        self._families: dict[str, Pairs | Triples] = dict(index.pairs)
        for kind in filter(is_triple, run.mix):
            if triples := index.triples(kind, run.children // 2):
                self._families[kind] = triples
        self._families = {kind: family for kind, family in self._families.items() if len(family.parents)}
        slides = pd.factorize(index.rows["slide"])[0]
        self._neighbours = {kind: _by_slide(slides[family.parents]) for kind, family in self._families.items()}
        self.usable: dict[str, Places] = {
            kind: np.array([n for n, near in enumerate(lists) if not self.shuffled or len(near) > 1], dtype=np.int64)
            for kind, lists in self._neighbours.items()
        }
        if self.whole:
            self.usable = {
                kind: np.flatnonzero(is_whole(index.pairs[kind].children, step_of(kind))) for kind in self.usable
            }

    def counts(self) -> dict[str, int]:
        """Samples per kind, whether they can be drawn or not."""
        return {kind: len(family.parents) for kind, family in self._families.items()}

    def draw(self, kind: str, place: int, rng: np.random.Generator) -> tuple[int, list[int]]:
        """Rows of the parent at `place` and of the tiles drawn to go with it: `children` of them, fewer where fewer are readable.

        It is the first draw of every method: equal generators give equal tiles.
        """
        family = self._families[kind]
        if self.whole:
            return int(family.parents[place]), family.children[place].tolist()
        under = self._another(kind, place, rng) if self.shuffled else place
        if isinstance(family, Pairs):
            drawn = [child for child in family.children[under].tolist() if child >= 0]
            rng.shuffle(drawn)  # the order of `rng.permutation`, at half its cost
            drawn = drawn[: self.children]
        else:
            cells = rng.permutation(np.flatnonzero(family.children[under] >= 0))[: self.children // 2]
            drawn = [int(family.children[under, cell]) for cell in cells]
            for cell in cells:
                finest = self._pairs[family.fine].children[family.places[under, cell]]
                drawn.append(int(rng.choice(finest[finest >= 0])))
        return int(family.parents[place]), drawn

    def _another(self, kind: str, place: int, rng: np.random.Generator) -> int:
        """The place of another parent of the same slide, each as likely."""
        near = self._neighbours[kind][place]
        other = int(rng.integers(len(near) - 1))
        return int(near[other if near[other] < place else other + 1])


def step_of(kind: str) -> int:
    """Linear factor between the two magnifications of a kind of pair: 4 of "5x-20x"."""
    (step,) = steps_of(kind)
    return step


def steps_of(kind: str) -> tuple[int, ...]:
    """Linear factors between the magnifications of a kind: 4 and 4 of "2.5x-10x-40x"."""
    magnifications = [float(name.removesuffix("x")) for name in kind.split("-")]
    return tuple(round(fine / coarse) for coarse, fine in pairwise(magnifications))


def _by_slide(slides: Places) -> list[Places]:
    """For each sample the places of its slide's samples, itself among them, ascending; samples of a slide share one array."""
    shared = np.split(np.argsort(slides, kind="stable"), np.bincount(slides).cumsum()[:-1])
    return [shared[slide] for slide in slides]
