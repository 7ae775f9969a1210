"""Which slides of a cohort are mapped and shown. Standard library only: the workflow asks when it parses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from mad.files import MadError

if TYPE_CHECKING:
    from mad.config import Config
    from mad.config.evaluation import EvaluationConfig


class Slide(Protocol):
    """What is asked of a slide: a `SlideRow` has it, and a line of the cohort table."""

    @property
    def slide_id(self) -> str: ...
    @property
    def annotation(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...


def mapped_slides(slides: Iterable[Slide], config: EvaluationConfig) -> list[str]:
    """Slides of the segmentation maps: those that the configuration names, else the first annotated test slides by id.

    With `split_by: block` a slide has no split, and the first annotated ones are taken.

    Raises:
        MadError: the configuration names a slide that the cohort lacks.
    """
    slides = list(slides)
    if config.segmentation_slides:
        return _known(config.segmentation_slides, [slide.slide_id for slide in slides], "evaluate.segmentation_slides")
    chosen = [slide.slide_id for slide in slides if slide.annotation and slide.split in (None, "test")]
    return sorted(chosen)[: config.segmentation_num_slides]


def viewed_slides(slides: Iterable[Slide], config: Config) -> list[str]:
    """Slides of the viewer, in the order of the cohort, or as `viewer.slides` names them.

    Raises:
        MadError: it names a slide that the cohort lacks.
    """
    slides = list(slides)
    names = [slide.slide_id for slide in slides]
    if config.viewer.slides == "all":
        return names
    if config.viewer.slides == "maps":
        return mapped_slides(slides, config.evaluate)
    return _known(config.viewer.slides, names, "viewer.slides")


def _known(wanted: Iterable[str], names: list[str], key: str) -> list[str]:
    """Each of `wanted` once, all of them being among the cohort's `names`."""
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names[:20])}"
            raise MadError(f"{key}: the cohort has no slide {name!r}; {known}")
    return list(dict.fromkeys(wanted))
