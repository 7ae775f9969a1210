"""Configuration of training runs: one entry of `runs:` is one encoder.

Defaults are those of the MAD paper or near DINOv2's (Oquab et al. 2023), for runs of one GPU; DINOv2's own numbers are presets
(`mad.config.presets`). What a run *is* stands in `RunConfig`; what only concerns the machine stands in `mad.config.runtime`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mad.config.base import Section
from mad.config.distill import DistillConfig, with_defaults
from mad.config.presets import PresetName, resolve_preset
from mad.config.run_checks import check_run
from mad.config.runtime import RuntimeConfig
from mad.config.views import PhotometricConfig, ViewsConfig
from mad.config.weights import weights_file

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Deviation = Annotated[float, Field(gt=0)]
TAKEN = {"global_pool": "backbone.pooling", "pretrained": "init"}
"""Arguments of timm's that other keys decide."""


class BackboneConfig(Section):
    """The encoder: any timm model whose output is one vector per image."""

    model: str = "vit_small_patch14_reg4_dinov2"
    """timm model name."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`, e.g. `{depth: 4, reg_tokens: 4}`. The image size is that of the tiles."""
    pooling: Literal["cls", "avg"] = "cls"
    """The embedding: the class token, or the average of the patch tokens (or of the last feature map)."""
    mean: tuple[float, float, float] | None = None
    """Channel means of intensities in [0, 1] that images are normalised by; not given: timm's for `model`. Weights that `init`
    names need those that they were trained with: where that is told beside them, other ones are refused unless they stand here."""
    std: tuple[Deviation, Deviation, Deviation] | None = None
    """Their standard deviations."""

    @model_validator(mode="after")
    def _is_consistent(self) -> BackboneConfig:
        if taken := sorted(self.args.keys() & TAKEN.keys()):
            raise ValueError(f"backbone.args: {taken[0]} is set by {TAKEN[taken[0]]}; take it away")
        if (self.mean is None) != (self.std is None):
            raise ValueError("backbone: mean and std go together; give both or neither")
        return self


class HeadConfig(Section):
    """The projection head: a three-layer MLP, an L2 norm, and a bank of unit-length prototypes."""

    hidden: int = Field(2048, ge=1)
    """Width of the MLP."""
    bottleneck: int = Field(384, ge=1)
    """Dimension of the normalised output that is compared with the prototypes."""
    prototypes: int = Field(65536, ge=2)
    """Number of prototypes K."""
    standardise: bool = False
    """Initialise the MLP on training tiles so that its activations start with mean 0 and variance 1: for short runs from
    random weights, whose embeddings are nearly parallel. A separate head of masked patches stays as it is."""


class MaskConfig(Section):
    """Masked patches (iBOT; DINOv2): the student's global views lose blocks of patches, the loss asks for what the teacher saw."""

    weight: float = Field(0.0, ge=0)
    """Weight of the loss on masked patches; 0: nothing is masked. DINOv2: 1. Under `mad` the student has no global view of a
    pair, so standalone tiles alone are masked."""
    head: Literal["shared", "separate"] = "separate"
    """`shared`: patches pass through the image's own head. `separate`: through one of their own (DINOv2 from ViT-L on)."""
    hidden: int | None = Field(None, ge=1)
    """`separate`: width of the MLP; not given: that of `head`."""
    bottleneck: int | None = Field(None, ge=1)
    """`separate`: dimension of the normalised output (DINOv2: 256); not given: that of `head`."""
    prototypes: int | None = Field(None, ge=2)
    """`separate`: number of prototypes; not given: that of `head`."""
    probability: float = Field(0.5, gt=0, le=1)
    """Share of the student's global views that are masked."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of patches that a masked view loses."""

    @model_validator(mode="after")
    def _is_consistent(self) -> MaskConfig:
        if not 0 < self.ratio[0] <= self.ratio[1] <= 1:
            raise ValueError(f"ratio: two shares of the patches, 0 < smallest <= largest <= 1; got {list(self.ratio)}")
        if self.head == "shared" and (self.hidden or self.bottleneck or self.prototypes):
            raise ValueError("ibot: hidden, bottleneck and prototypes are sizes of a separate head; this one is shared")
        return self


class RunConfig(Section):
    """One training."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")
    """Folder under `results/train/`."""
    method: Literal["mad", "mad_global", "dinov2", "xmag"]
    """`mad`: teacher on the parent, student on its children (MAD paper, Table 1). `mad_global`: the student also sees the two
    views of the parent, masked where `ibot.weight` > 0, each of them against the teacher's other one. `dinov2`: multi-crop on
    the same tiles. `xmag`: a frozen teacher on the children, the student on their parent (docs/xmag.md, with its defaults)."""
    distill: DistillConfig | None = None
    """`xmag`: the teacher, and what is learned from it."""
    preset: PresetName | None = Field(None, exclude=True)
    """Numbers of a published training for every key that this entry does not name: DINOv2's `vitl16_short.yaml` or
    `vitg14.yaml`, with the learning rate of this entry's `batch`. The recipe shows the numbers instead of the name."""
    backbone: BackboneConfig = BackboneConfig()
    """The encoder that is trained."""
    init: str = Field(
        "random",
        pattern=r"^(random|timm|run:[A-Za-z0-9][A-Za-z0-9_-]{0,99}|file:.+|hf-hub:[\w.-]+/[\w.-]+(@[\w./-]+)?)$",
    )
    """Where the encoder starts: `random`, `timm` (the weights that timm publishes for `backbone.model`), `run:NAME` (another
    run's), `file:PATH` (a .safetensors or .pth file, or a folder with model.safetensors or pytorch_model.bin), or
    `hf-hub:OWNER/NAME` (a repository of the Hugging Face hub, `@REVISION` optional). Names may be timm's, Meta's or
    Hugging Face's for DINOv2."""
    steps: int = Field(60_000, ge=1)
    """Optimiser steps."""
    batch: int = Field(64, ge=1)
    """Samples per step over all processes: pairs or standalone tiles."""
    lr: float = Field(2e-4, gt=0)
    """Peak learning rate, for this batch (nothing rescales it)."""
    warmup: int = Field(1000, ge=0)
    """Steps of linear warm-up."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of the cosine."""
    weight_decay: float = Field(0.04, ge=0)
    """Weight decay at the start; biases, norms and other vectors have none."""
    weight_decay_end: float = Field(0.4, ge=0)
    """Weight decay at the end of the cosine."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate per layer below the head; 1: all layers learn alike (DINOv2 from random weights)."""
    patch_embed_lr: float = Field(1.0, gt=0)
    """Factor on the learning rate of the patch embedding (DINOv2: .2)."""
    backbone_lr: float = Field(1.0, gt=0)
    """Factor on the learning rate of the whole encoder, low where it starts from trained weights."""
    freeze_backbone: int = Field(0, ge=0)
    """First steps during which only the head learns, for an encoder that starts from trained weights; the encoder then has
    a warm-up of its own."""
    clip: float = Field(3.0, gt=0)
    """Largest norm of the gradient, of backbone and heads together (DINOv2 clips each of them apart)."""
    ema: float = Field(0.994, ge=0, le=1)
    """Momentum of the teacher at the start."""
    ema_end: float = Field(1.0, ge=0, le=1)
    """Momentum of the teacher at the end of the cosine."""
    student_temp: float = Field(0.1, gt=0)
    """Temperature of the student's softmax."""
    teacher_temp: float = Field(0.07, gt=0)
    """Temperature of the teacher's targets after their warm-up."""
    teacher_temp_start: float = Field(0.04, gt=0)
    """Temperature of the teacher's targets at the first step."""
    teacher_temp_warmup: int = Field(0, ge=0)
    """Steps over which the teacher's temperature rises linearly; 0 uses `teacher_temp` throughout."""
    head: HeadConfig = HeadConfig()
    """The projection head."""
    freeze_last_layer: int = Field(1250, ge=0)
    """First steps during which the prototypes stay as they are."""
    centring: Literal["sinkhorn", "ema"] = "sinkhorn"
    """How the teacher's targets are kept from collapsing: balanced over the batch by Sinkhorn-Knopp (DINOv2), or softmax after
    subtracting a moving average of the scores (DINO)."""
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    """`ema`: momentum of the moving average, per step."""
    ibot: MaskConfig = MaskConfig()
    """Masked patches."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Share of the student's samples for which each residual branch of a ViT is skipped, and not computed (DINOv2: .3 to .4)."""
    spread: Literal["koleo", "kde"] = "koleo"
    """The regulariser that spreads the student's full-size views, averaged over view positions: KoLeo (DINOv2), or the kernel
    density estimate of Virchow2."""
    koleo: float = Field(0.2, ge=0)
    """Weight of the regulariser that `spread` names, of the mean over view positions (DINOv2: KoLeo .1 on each of two global
    crops, which is .2 here; Virchow2: KDE .05)."""
    kde_kappa: float = Field(5.0, gt=0)
    """`spread: kde`: concentration of the kernel."""
    views: ViewsConfig = ViewsConfig()
    """Multi-crop views."""
    photometric: PhotometricConfig = PhotometricConfig()
    """Photometric augmentation of every view."""
    children: int = Field(4, ge=1)
    """`mad`: children that the student sees per pair, drawn anew each time."""
    pairs: Literal["aligned", "shuffled", "interpolated", "same"] = "aligned"
    """Methods with pairs: what stands for a parent's children. `aligned`: its own. Controls: `shuffled`: those of another
    parent of the same slide. `interpolated`: their places cut from the parent's own pixels and enlarged: alignment without
    native detail. `same`: no change of magnification: teacher and student see one and the same whole tile, which is drawn
    from those that `aligned` would read, the parent with probability 2 / (2 + children)."""
    pair_tiles: Literal["one", "all"] = "one"
    """`dinov2`: which tiles of a pair sample are cropped. `one`: one of the tiles that `mad` would read, the parent with
    probability 2 / (2 + children), so that both methods see the magnifications in the same proportion and at nearly the
    same cost. `all`: every tile that `mad` would read (1 + children multi-crops per sample, about 4 times the cost;
    the regulariser then drives a parent and its children apart too)."""
    targets: Literal["tile", "cell"] = "tile"
    """Methods `mad` and `mad_global`: what of the parent a child answers to. `tile`: the embedding of the whole (the paper).
    `cell`: the mean of the parent's patch tokens, or of its last feature map, where the child lies (ours; for `pooling: avg`, since
    a class token is compared with a mean of others otherwise)."""
    parent_weight: float = Field(1.0, ge=0)
    """`mad_global`: weight of each term between the parent's own views; that of a term between a child and its parent is 1."""
    mix: dict[str, float] = Field(default_factory=dict)
    """Weight per kind of sample, e.g. `{"2.5x-10x": 1, "10x-40x": 14, standalone: 6}`; an empty one weighs by counts, as
    the paper's Table 2 implies. A kind of three magnifications, `2.5x-10x-40x`, shows half of `children` at the middle one
    and half at the finest under one parent; it is drawn only where it is named here."""
    mix_mode: Literal["alternate", "within"] = "alternate"
    """`alternate`: every batch is of one kind, the kinds take turns by weight. `within`: every batch holds all kinds."""
    loader: Literal["indexed", "stream"] = "indexed"
    """`indexed`: every sample by its place in a tar, in seeded permutations; stopped runs resume exactly. `stream`: tars drawn
    at random and read from end to end, for object stores and slow disks; a resumed run goes on with other samples."""
    shuffle_buffer: int = Field(256, ge=1)
    """`loader: stream`: samples per kind and loading process among which the next one is drawn."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the device is good at it (CUDA from Ampere, CPU with avx512_bf16 or AMX), otherwise fp32."""
    seed: Seed | None = None
    """Seed of weights, order and views; not given: the configuration's `seed`."""
    seeds: list[Seed] | None = Field(None, exclude=True)
    """Several runs in one entry: `[0, 1, 2]` stands for NAME-s0, NAME-s1 and NAME-s2, which differ in `seed` alone. Encoders
    of this run become one per seed, and `init: run:` of a run with `seeds` means that one's twin of the same seed."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Threads, checkpoints, logging: may change between a run and its resumption."""

    @property
    def init_file(self) -> Path | None:
        """The file of weights that `init: file:PATH` names; None for another start."""
        return weights_file(self.init.removeprefix("file:")) if self.init.startswith("file:") else None

    @model_validator(mode="before")
    @classmethod
    def _write_out_preset(cls, value: Any) -> Any:
        return with_defaults(resolve_preset(value)) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _is_consistent(self) -> RunConfig:
        check_run(self)
        return self
