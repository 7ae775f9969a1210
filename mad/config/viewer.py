"""Configuration of the static viewer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mad.config.base import Section


class ViewerConfig(Section):
    """The folder `report/viewer/`: slides to zoom into, with labels and predictions as layers."""

    slides: Literal["maps", "all"] | list[str] = "maps"
    """Which slides are shown. `maps`: those of the segmentation maps (`evaluate.segmentation_slides`). `all`: every slide of the
    cohort. Or slide_ids. Slides without maps are shown with their labels alone."""
    magnification: float = Field(10, gt=0)
    """The finest magnification that is stored: each doubling takes four times the disk."""
    quality: int = Field(80, ge=1, le=100)
    """JPEG quality."""
