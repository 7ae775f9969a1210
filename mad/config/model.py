"""The whole of `config.yaml` as pydantic models: every key, its default, its meaning.

`workflow/schemas/config.schema.json` is generated from here (`mad config schema`), a test compares the two.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from mad.config.adapters import AdapterConfig, check_adapters
from mad.config.base import Section
from mad.config.biomarkers import BiomarkersConfig, check_biomarkers
from mad.config.distill import check_teachers
from mad.config.encoders import EncoderConfig
from mad.config.evaluation import EvaluationConfig
from mad.config.evidence import EvidenceConfig
from mad.config.ladder_checks import check_ladder, follow_ladder
from mad.config.regions import MixerConfig, check_mixers
from mad.config.synthetic import SyntheticConfig
from mad.config.training import RunConfig
from mad.config.viewer import ViewerConfig
from mad.files import MadError


class SplitConfig(Section):
    """Fractions of patients (or of the slide's width, `split_by: block`) per split."""

    train: float = Field(0.7, ge=0, le=1)
    """Share of patients that train."""
    val: float = Field(0.1, ge=0, le=1)
    """Share of patients on which choices are made."""
    test: float = Field(0.2, ge=0, le=1)
    """Share of patients that are only tested on."""

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitConfig:
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            raise ValueError(f"train + val + test must be 1, not {self.train + self.val + self.test:g}")
        return self


class CohortConfig(Section):
    """Which slides, whose, and on which side."""

    sheet: str | None = None
    """The cohort sheet `slides.tsv` (docs/data-contracts.md). Not given: the synthetic cohort of `synthetic:`."""
    split_by: Literal["patient", "block"] = "patient"
    """`patient`: no patient on two sides. `block`: parts of each slide with a guard gap, for a handful of slides; every
    table then says "not patient-held-out"."""
    split: SplitConfig = SplitConfig()
    """Fractions used where the sheet has no `split` column, and by `split_by: block`."""
    block_axis: Literal["auto", "x", "y"] = "auto"
    """`split_by: block`: the axis along which a slide is cut; `auto` takes the longer one."""
    block_guard: int = Field(1, ge=0)
    """`split_by: block`: columns (or rows) of coarsest tiles left out between two splits."""


class TissueConfig(Section):
    """Tissue against glass."""

    mpp: float = Field(4.0, gt=0)
    """Resolution of the tissue mask, um/px."""
    method: Literal["otsu", "saturation", "density", "texture"] = "otsu"
    """`otsu`: Otsu's threshold on saturation. `saturation`: the fixed threshold `min_saturation`. `density`: Otsu's threshold
    on optical density, for pale or grey stains. `texture`: local contrast, for unstained tissue and fat."""
    min_saturation: float = Field(0.04, ge=0, le=1)
    """Lowest saturation that may count as tissue, whatever Otsu's threshold says: keeps blank slides blank."""
    min_density: float = Field(0.02, ge=0, le=1)
    """`density`: lowest mean optical density that may count as tissue."""
    min_contrast: float = Field(0.01, ge=0, le=1)
    """`texture`: standard deviation of brightness (0 to 1) over 40 um from which on there is tissue."""
    min_area_um2: float = Field(2000.0, ge=0)
    """Specks and holes smaller than this are removed."""
    exclude_pen: bool = False
    """Whether ink of felt pens counts as glass. The tile table's column `pen` has its share either way; made for H&E: a stain
    that absorbs red most (Luxol fast blue) looks like blue ink."""


class TileConfig(Section):
    """The grid of aligned tiles (MAD paper, Methods: multi-scale tile extraction and indexing)."""

    magnifications: list[float] = [2.5, 10, 40]
    """The ladder, coarsest first; neighbours differ by an integer factor s, and a tile has s x s children."""
    tile_px: int = Field(224, ge=16, le=1024)
    """Side of a tile in pixels, the same at every magnification."""
    scale_tolerance: float = Field(0.12, ge=0, lt=0.5)
    """Slides whose um/px lies within this share of the finest wanted one keep their own pixel grid."""
    on_missing_scale: Literal["drop", "upsample", "fail"] = "drop"
    """What happens to a magnification that is finer than the slide."""
    pyramid: Literal["scanner", "area"] = "scanner"
    """`scanner`: the slide's own levels where they exist. `area`: every level is the area average of level 0."""
    icc: Literal["keep", "apply"] = "keep"
    """`keep`: pixels as they are stored. `apply`: pixels converted to sRGB by the slide's own ICC profile, where it has one."""
    min_tissue: float = Field(0.1, ge=0, le=1)
    """Tiles with a smaller share of tissue are `blank`."""
    tissue: TissueConfig = TissueConfig()
    """The tissue mask."""

    @field_validator("magnifications")
    @classmethod
    def _is_ladder(cls, value: list[float]) -> list[float]:
        steps = [fine / coarse for coarse, fine in pairwise(value)]
        if len(value) > 3:
            raise ValueError(f"a ladder has at most three magnifications (tiles are indexed i, j, k, m); got {value}")
        if not value or any(step < 2 or abs(step - round(step)) > 1e-9 for step in steps):
            raise ValueError(f"magnifications must rise by integer factors from 2 on, as in [2.5, 10, 40]; got {value}")
        return value


class LabelConfig(Section):
    """From annotations to one class per tile."""

    classes: list[str] = Field(
        ["Gray Matter", "White Matter", "Leptomeninges", "Superficial Cortex", "Background"],
        min_length=1,
        max_length=255,
    )
    """Class names in order of priority: the first wins ties and overlaps of polygons."""
    colours: dict[str, Annotated[str, Field(pattern="^#[0-9A-Fa-f]{6}$")]] = {}
    """Colour per class, `#rrggbb`, for maps and figures; the rest get a default palette."""
    rename: dict[str, str] = {}
    """Annotation name -> class name, for annotations that use other words."""
    mask_values: dict[Annotated[int, Field(ge=0, le=65535)], str] = {}
    """Pixel value -> class name, for annotations that are label masks. 0 is no class unless it is listed."""
    background: str | None = "Background"
    """The class that stands for glass; null: glass has no class."""
    glass_is_background: bool = True
    """Glass that no polygon covers counts as `background`."""
    mpp: float = Field(2.0, gt=0)
    """Resolution of the class raster, um/px."""
    min_annotated: float = Field(0.5, gt=0, le=1)
    """A tile gets a label when at least this share of it is annotated (or background)."""

    @model_validator(mode="after")
    def _known(self) -> LabelConfig:
        if "Unlabelled" in self.classes:
            raise ValueError("classes: 'Unlabelled' is the name of tiles without a class; choose another")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes holds a name twice: {self.classes}")
        given = [colour.lower() for colour in self.colours.values()]
        if twice := [name for name, colour in self.colours.items() if given.count(colour.lower()) > 1]:
            raise ValueError(f"colours: {twice} have a colour in common, which no map could tell apart")
        for what, names in (
            ("colours", self.colours),
            ("rename", set(self.rename.values())),
            ("mask_values", set(self.mask_values.values())),
            ("background", {self.background} if self.background else set()),
        ):
            if unknown := sorted(set(names) - set(self.classes)):
                raise ValueError(f"{what} names {unknown}, which classes does not list: {self.classes}")
        return self


Cap = Annotated[int, Field(ge=0)] | None | dict[str, Annotated[int, Field(ge=0)] | None]


class SampleConfig(Section):
    """Which tiles are cut, under class caps (MAD paper, Table 2). `null` means no cap."""

    max_pairs: dict[str, Cap] = {}
    """Cap on parents per class and split for each transition, e.g. `{"2.5x-10x": 1300, "10x-40x": null}`; or one per class:
    `{"10x-40x": {Gray Matter: 18410, White Matter: 15116}}`, where a class that is not named has no cap."""
    max_standalone: dict[str, Cap] = {}
    """Cap on standalone tiles per class and split at each magnification, e.g. `{"2.5x": 200, "10x": 400}`, or one per class.
    `max_unlabelled` alone caps unlabelled tiles: 0 here does not keep them out."""
    max_unlabelled: Annotated[int, Field(ge=0)] | None = None
    """Cap on unlabelled parents and standalone tiles of each kind and split, whatever `max_pairs` and `max_standalone` say."""
    background_pairs: bool = False
    """Whether parents labelled as background make pairs (the paper has none)."""
    test_share: float = Field(1.0, gt=0)
    """Caps of the val and test splits as a multiple of the train caps."""


class ShardConfig(Section):
    """How pixels are stored."""

    format: Literal["jpg", "png", "webp"] = "jpg"
    """`jpg` (lossy), `png` or `webp` (both lossless)."""
    quality: int = Field(95, ge=1, le=100)
    """JPEG quality."""
    subsampling: Literal["444", "422", "420"] = "444"
    """JPEG chroma subsampling."""
    max_bytes: int = Field(1_000_000_000, ge=10_000)
    """A shard is closed when it would grow past this size."""


class Config(Section):
    """A whole configuration."""

    results: str = "results"
    """Folder of everything that is made; every override names its own. Without blanks, quotes and braces."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of selection, training order and evaluation."""
    on_bad_slide: Literal["quarantine", "fail"] = "quarantine"
    """What an unreadable slide does: it is listed with its cause and the rest goes on, or the run stops."""
    on_missing_encoder: Literal["absent", "fail"] = "absent"
    """Published weights that cannot be had (gated, offline): the encoder's row says so and the rest goes on, or the run stops."""
    cohort: CohortConfig = CohortConfig()
    """Slides and patients."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """The synthetic cohort, made when `cohort.sheet` is not given."""
    tile: TileConfig = TileConfig()
    """Tiling."""
    label: LabelConfig = LabelConfig()
    """Labels."""
    sample: SampleConfig = SampleConfig()
    """Selection."""
    shard: ShardConfig = ShardConfig()
    """Shards."""
    runs: list[RunConfig] = []
    """Trainings, one entry each."""
    encoders: list[EncoderConfig] = []
    """Encoders to embed with, evaluate and compare, one entry each."""
    adapters: list[AdapterConfig] = []
    """Cross-scale adapters of embeddings, one entry each."""
    mixers: list[MixerConfig] = []
    """Region mixers (MMA), one entry each."""
    evaluate: EvaluationConfig = EvaluationConfig()
    """Protocols."""
    evidence: EvidenceConfig = EvidenceConfig()
    """The evidence table: methods with several seeds each."""
    biomarkers: BiomarkersConfig = BiomarkersConfig()
    """Slide-level targets and the heads that predict them."""
    viewer: ViewerConfig = ViewerConfig()
    """The slides with their maps in a browser."""

    @field_validator("results")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        if not value:
            raise ValueError("is empty, so that everything would be written to /; name a folder, as in results/mine")
        if special := sorted(set(re.findall(r"""[\s"'`$&|;<>()*?{}~\\]""", value))):
            raise ValueError(f"holds {special}, which commands of the workflow cannot write into; name another folder")
        return value

    @model_validator(mode="after")
    def _keeps_to_the_ladder(self) -> Config:
        object.__setattr__(self, "evaluate", follow_ladder(self.evaluate, self.tile.magnifications))
        check_ladder(self)
        return self

    @model_validator(mode="after")
    def _names(self) -> Config:
        for what in ("runs", "encoders", "mixers"):
            names = [entry.name for entry in getattr(self, what)]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{what}: the name {twice[0]!r} is used twice")
        runs = {run.name for run in self.runs}
        for encoder in self.encoders:
            kind, _, target = encoder.spec.partition(":")
            if kind in ("run", "random") and target not in runs:
                raise ValueError(f"encoders: {encoder.name!r} asks for run {target!r}; runs has {sorted(runs)}")
        known = {encoder.name for encoder in self.encoders}
        for group, members in self.evidence.groups.items():
            if unknown := sorted(set(members) - known):
                raise ValueError(f"evidence.groups.{group} names {unknown}; encoders has {sorted(known)}")
        check_adapters(self)
        check_mixers(self)
        check_biomarkers(self)
        check_teachers(self)
        return self

    def run(self, name: str) -> RunConfig:
        """The entry of `runs:` with this name.

        Raises:
            MadError: there is none.
        """
        return _named("runs", self.runs, name)

    def encoder(self, name: str) -> EncoderConfig:
        """The entry of `encoders:` with this name.

        Raises:
            MadError: there is none.
        """
        return _named("encoders", self.encoders, name)

    def mixer(self, name: str) -> MixerConfig:
        """The entry of `mixers:` with this name.

        Raises:
            MadError: there is none.
        """
        return _named("mixers", self.mixers, name)


Entry = TypeVar("Entry", RunConfig, EncoderConfig, MixerConfig)


def _named(what: str, entries: list[Entry], name: str) -> Entry:
    for entry in entries:
        if entry.name == name:
            return entry
    raise MadError(f"{what}: no entry named {name!r}; there are {sorted(entry.name for entry in entries)}")
