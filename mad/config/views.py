"""Configuration of views: crops and photometric augmentation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from mad.config.base import Section

Share = Annotated[float, Field(ge=0, le=1)]


class ViewsConfig(Section):
    """Standard multi-crop (DINOv2): of every tile under `dinov2`, of standalone tiles under `mad`."""

    global_crops: int = Field(2, ge=2)
    """Large crops; teacher and student both see them."""
    local_crops: int = Field(8, ge=0)
    """Small crops; only the student sees them."""
    local_px: int | None = Field(None, ge=8)
    """Side of a local crop; not given: 3/7 of the tile, rounded to the backbone's patches (96 or 98 of 224)."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Smallest and largest share of the tile's area that a global crop covers."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Smallest and largest share of the tile's area that a local crop covers."""

    @field_validator("global_scale", "local_scale")
    @classmethod
    def _is_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError(f"a scale is two shares of the area, 0 < smallest <= largest <= 1; got {list(value)}")
        return value


class PhotometricConfig(Section):
    """Photometric augmentation of every view (DINOv2's, whose strengths are the defaults)."""

    jitter: float = Field(1.0, ge=0, le=2)
    """Strength of the colour jitter: 1 is brightness and contrast .4, saturation .2, hue .1."""
    jitter_share: float = Field(0.8, ge=0, le=1)
    """Share of views that are jittered."""
    grayscale: float = Field(0.2, ge=0, le=1)
    """Share of views that lose their colour."""
    blur: tuple[Share, Share, Share] = (1.0, 0.1, 0.5)
    """Share of views that are blurred: first global view, further global views, local views and children."""
    solarize: float = Field(0.2, ge=0, le=1)
    """Share of the further global views that are solarised."""
    stain: float = Field(0.0, ge=0, le=1)
    """Strength s of the stain jitter of every view: haematoxylin, eosin and the residual stain are each multiplied by up to
    1 +- s, and shifted by up to +- s times an optical density of 0.2. 0 leaves the stains alone."""
