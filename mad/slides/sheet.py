"""The cohort sheet `slides.tsv`: whose slide, which split. Standard library only: the workflow reads it when it parses."""

from __future__ import annotations

import csv
import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mad.config.model import Config
from mad.files import MadError, Pathlike, atomic_path
from mad.slides.synthetic.cohort import sheet_rows

SLIDE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
SPLITS = ("train", "val", "test")
REQUIRED = ("slide_id", "path", "patient_id")
KNOWN = (*REQUIRED, "annotation", "mpp", "split", "site", "scanner", "stain")


@dataclass(frozen=True)
class SlideRow:
    """One slide of the cohort. Paths are absolute or relative to the working directory; `targets` are all further columns."""

    slide_id: str
    path: str
    patient_id: str
    annotation: str | None = None
    mpp: float | None = None
    split: str | None = None
    site: str | None = None
    scanner: str | None = None
    stain: str | None = None
    targets: dict[str, str] = field(default_factory=dict)

    def tiling(self) -> dict[str, Any]:
        """What the slide's tile table depends on."""
        return {key: value for key, value in asdict(self).items() if key in ("slide_id", "path", "annotation", "mpp")}


def cohort_rows(config: Config) -> list[SlideRow]:
    """The slides that a configuration names: those of `cohort.sheet`, or of the synthetic cohort. Opens no slide."""
    cohort = config.cohort
    options: dict[str, Any] = {"split_by": cohort.split_by, "fractions": cohort.split.model_dump(), "seed": config.seed}
    if cohort.sheet:
        return read_sheet(cohort.sheet, **options)
    folder = Path(config.results) / "synthetic"
    records = sheet_rows(config.synthetic)
    if cohort.split_by == "block":
        records = [{**record, "split": ""} for record in records]
    return check_rows(records, source="synthetic cohort", folder=folder, **options)


def read_sheet(path: Pathlike, *, split_by: str, fractions: Mapping[str, float], seed: int) -> list[SlideRow]:
    """Read and check the cohort sheet.

    Relative paths in it start at the sheet's own folder. With `split_by` "patient" every slide gets a split: the one given,
    or one drawn for its patient (`draw_split`). With "block" it is None.

    Raises:
        MadError: all faults of the sheet, one line each.
    """
    path = Path(path)
    if not path.exists():
        raise MadError(
            f"{path}: no such cohort sheet; set cohort.sheet to a tab-separated file with {', '.join(REQUIRED)}"
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t")
        records = list(reader)
        columns = reader.fieldnames or []
    if missing := [name for name in REQUIRED if name not in columns]:
        raise MadError(f"{path}: lacks the column(s) {missing}; it has {list(columns)} (are they separated by tabs?)")
    return check_rows(records, source=str(path), folder=path.parent, split_by=split_by, fractions=fractions, seed=seed)


def check_rows(
    records: list[dict[str, str]],
    *,
    source: str,
    folder: Path,
    split_by: str,
    fractions: Mapping[str, float],
    seed: int,
) -> list[SlideRow]:
    """Rows of a sheet as `SlideRow`s with their split; see `read_sheet`."""
    faults: list[str] = []
    rows = [_row(record, number, folder, faults) for number, record in enumerate(records, start=2)]
    for slide_id, count in Counter(row.slide_id for row in rows).items():
        if count > 1:
            faults.append(f"slide_id {slide_id!r} occurs {count} times; ids are unique")
    given = {row.split for row in rows if row.split}
    if split_by == "patient" and given and any(row.split is None for row in rows):
        faults.append("some slides have a split and some have none; fill the column in or empty it")
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row.patient_id, set()).add(row.split or "")
    if split_by == "patient":
        faults += [
            f"patient {who!r} is on two sides: {sorted(where)}" for who, where in sides.items() if len(where) > 1
        ]
    if split_by == "block" and given:
        faults.append(
            "has a split column, which cohort.split_by: block does not use; empty it, or set split_by: patient"
        )
    if not rows:
        faults.append("holds no slide")
    if faults:
        raise MadError(f"{source}: {len(faults)} fault(s)\n" + "\n".join(f"  {fault}" for fault in faults))
    if split_by == "block" or given:
        return rows
    drawn = [replace(row, split=draw_split(row.patient_id, fractions, seed)) for row in rows]
    if empty := [name for name in SPLITS if fractions[name] and name not in {row.split for row in drawn}]:
        raise MadError(
            f"{source}: {len(sides)} patients drawn at random leave the split(s) {empty} empty; give every slide its split "
            "in the `split` column (train, val or test), or use cohort.split_by: block for a handful of slides"
        )
    return drawn


def _row(record: Mapping[str, str], number: int, folder: Path, faults: list[str]) -> SlideRow:
    def cell(name: str) -> str | None:
        return (record.get(name) or "").strip() or None

    slide_id = cell("slide_id") or ""
    if not SLIDE_ID.fullmatch(slide_id):
        clean = re.sub(r"[^A-Za-z0-9_-]+", "-", slide_id).strip("-_")[:100] or f"slide{number - 1}"
        faults.append(f"line {number}: slide_id {slide_id!r} may hold only letters, digits, _ and - (try {clean!r})")
    for name in ("path", "patient_id"):
        if not cell(name):
            faults.append(f"line {number}: {name} is empty")
    split = cell("split")
    if split and split not in SPLITS:
        near = difflib.get_close_matches(split, SPLITS, n=1)
        faults.append(
            f"line {number}: split {split!r} is none of {SPLITS}" + (f", did you mean {near[0]!r}?" if near else "")
        )
    mpp = None
    if text := cell("mpp"):
        try:
            mpp = float(text)
        except ValueError:
            faults.append(f"line {number}: mpp {text!r} is no number (um per pixel, 0.25 for 40x)")
        if mpp is not None and not 0.02 <= mpp <= 20:
            faults.append(f"line {number}: mpp {mpp:g} um/px is outside 0.02..20")
            mpp = None
    annotation = cell("annotation")
    return SlideRow(
        slide_id=slide_id,
        path=str(folder / (cell("path") or "")),
        patient_id=cell("patient_id") or "",
        annotation=str(folder / annotation) if annotation else None,
        mpp=mpp,
        split=split,
        site=cell("site"),
        scanner=cell("scanner"),
        stain=cell("stain"),
        targets={name: value or "" for name, value in record.items() if name not in KNOWN and isinstance(name, str)},
    )


def draw_split(patient_id: str, fractions: Mapping[str, float], seed: int) -> str:
    """The split of a patient: a hash of (seed, patient) in [0, 1) against the cumulated fractions.

    It depends on nothing else, so patients who join later move nobody, and no patient ever changes sides.
    """
    key = hashlib.blake2b(f"{seed}\t{patient_id}".encode(), digest_size=8).digest()
    place, end = int.from_bytes(key, "big") / 2**64, 0.0
    for name in SPLITS:
        end += fractions[name]
        if place < end:
            return name
    return next(name for name in reversed(SPLITS) if fractions[name] > 0)


def write_sheet(path: Pathlike, records: list[dict[str, str]]) -> None:
    """Write records as a tab-separated cohort sheet."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
