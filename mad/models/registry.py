"""Published tile encoders by name: what each one is, where its weights are, and under which licence.

The architecture is built here and the weights are loaded into it strictly, so that a local file does as well as the hub. Facts
are those of the model cards and papers named at each entry; `mad encoders` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}


@dataclass(frozen=True)
class Published:
    """One published encoder."""

    title: str
    hub: str
    """Repository on the Hugging Face hub, whose page tells its licence."""
    model: str
    """timm architecture."""
    dim: int
    """Dimension of the embedding with its published pooling."""
    licence: str
    gated: bool
    """Whether the licence has to be accepted on the repository's page."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `timm.create_model`; classes of layers by their names in timm.layers or torch.nn."""
    pooling: Literal["cls", "avg", "cls+avg"] = "cls"
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    """Of intensities in [0, 1]."""
    image_px: int = 224
    """Side of the images that it was published for."""
    transform: str = "224 px, as they are"
    """What its model card does to an image before normalising. Tiles are given to every encoder as they are, at their own
    scale: resizing would change the um/px that it sees."""
    paper: str = ""


PUBLISHED = {
    "uni": Published(
        "UNI", "MahmoodLab/UNI", "vit_large_patch16_224", 1024, "CC-BY-NC-ND-4.0", True, {"init_values": 1e-5},
        transform="resize to 224", paper="Chen et al. 2024, doi:10.1038/s41591-024-02857-3",
    ),
    "uni2-h": Published(
        "UNI2-h", "MahmoodLab/UNI2-h", "vit_giant_patch14_224", 1536, "CC-BY-NC-ND-4.0", True,
        {"depth": 24, "embed_dim": 1536, "num_heads": 24, "init_values": 1e-5, "mlp_ratio": 2.66667 * 2, "no_embed_class": True,
         "reg_tokens": 8, **SWIGLU},
        transform="resize to 224", paper="model card of MahmoodLab/UNI2-h",
    ),
    "prov-gigapath": Published(
        "Prov-GigaPath", "prov-gigapath/prov-gigapath", "vit_giant_patch14_dinov2", 1536, "Apache-2.0", True,
        {"patch_size": 16, "embed_dim": 1536, "depth": 40, "num_heads": 24, "init_values": 1e-5, "mlp_ratio": 5.33334},
        transform="resize to 256, crop the centre 224 (1.14 x larger structures)",
        paper="Xu et al. 2024, doi:10.1038/s41586-024-07441-w",
    ),
    "virchow2": Published(
        "Virchow2", "paige-ai/Virchow2", "vit_huge_patch14_224", 2560, "CC-BY-NC-ND-4.0", True,
        {"init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375, **SWIGLU}, pooling="cls+avg",
        transform="resize to 224", paper="Zimmermann et al. 2024, arXiv 2408.00738",
    ),
    "h-optimus-0": Published(
        "H-optimus-0", "bioptimus/H-optimus-0", "vit_giant_patch14_reg4_dinov2", 1536, "Apache-2.0", True,
        mean_std=((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)), paper="model card of bioptimus/H-optimus-0",
    ),
    "dinov2-g-reg": Published(
        "DINOv2 ViT-g/14, 4 registers", "timm/vit_giant_patch14_reg4_dinov2.lvd142m", "vit_giant_patch14_reg4_dinov2", 1536,
        "Apache-2.0", False, image_px=518, transform="resize to 518",
        paper="Oquab et al. 2023, arXiv 2304.07193; Darcet et al. 2024",
    ),
    "mad-np": Published(
        "MAD-NP", "IBI-CAAI/MAD-NP", "vit_giant_patch14_reg4_dinov2", 1536, "unknown", True,
        transform="not published: 224 px tiles", paper="Gokmen et al. 2025, arXiv 2512.14796 (weights announced there)",
    ),
}  # fmt: skip
