"""The cohort sheet `slides.tsv`: whose slide, which split. Standard library only: the workflow reads it when it parses."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mad.config.model import Config
from mad.files import MadError, Pathlike, atomic_path
from mad.slides.synthetic.cohort import sheet_rows

SLIDE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
SPLITS = ("train", "val", "test")
REQUIRED = ("slide_id", "path", "patient_id")
KNOWN = (*REQUIRED, "annotation", "mpp", "split", "site", "scanner", "stain")
Record = tuple[int, dict[str, str]]  # line of the sheet, cell by column


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
    return check_rows(list(enumerate(records, start=2)), source="synthetic cohort", folder=folder, **options)


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
    records, faults = _cells(path)
    return check_rows(
        records, faults, source=str(path), folder=path.parent, split_by=split_by, fractions=fractions, seed=seed
    )


def _cells(path: Path) -> tuple[list[Record], list[str]]:
    """The lines of a sheet that hold anything, each with its number and its cells by column, and the faults of its form.

    A byte order mark, Windows line ends, and the empty columns and rows that spreadsheets leave behind are no faults.

    Raises:
        MadError: the file is no table of the needed columns.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise MadError(f"{path}: is UTF-16 (a spreadsheet's 'Unicode text'); save it as UTF-8") from None
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise MadError(
            f"{path}: line {line} is not UTF-8 (byte 0x{byte:02x}; Latin-1 perhaps); save it as UTF-8"
        ) from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise MadError(f"{path}: line {reader.line_num}: {error}; is a quotation mark left open?") from None
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if not lines:
        raise MadError(f"{path}: is empty; its first line names the columns: {', '.join(REQUIRED)}")
    (head, columns), *rest = lines
    mark = next((mark for mark in ",;" if len(columns) == 1 and mark in columns[0]), None)
    if mark:
        raise MadError(f"{path}: is separated by {mark!r}, not by tabs; save it as tab-separated text")
    faults = [f"line {head}: column {name!r} occurs twice" for name, n in Counter(columns).items() if name and n > 1]
    for name in columns:
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
        if plain == "split_by":
            faults.append(
                f"line {head}: column {name!r} is a setting of the configuration (cohort.split_by); rename it"
            )
        if name not in KNOWN and plain in KNOWN:
            faults.append(f"line {head}: column {name!r} is to be written {plain!r}")
    if faults:
        raise _refusal(str(path), faults)
    if missing := [name for name in REQUIRED if name not in columns]:
        raise MadError(
            f"{path}: lacks the column(s) {missing}; it has {[name for name in columns if name]} "
            "(are they separated by tabs?)"
        )
    records = []
    for number, cells in rest:
        width = len(columns)
        if any(cells[width:]) or any(cell for name, cell in zip(columns, cells, strict=False) if not name):
            faults.append(f"line {number}: has a cell under no column; is there a tab too many?")
        records.append(
            (number, {name: cell for name, cell in zip_longest(columns, cells[:width], fillvalue="") if name})
        )
    return records, faults


def check_rows(
    records: list[Record],
    faults: Iterable[str] = (),
    *,
    source: str,
    folder: Path,
    split_by: str,
    fractions: Mapping[str, float],
    seed: int,
) -> list[SlideRow]:
    """Rows of a sheet as `SlideRow`s with their split, `faults` of its form added to theirs; see `read_sheet`."""
    faults = list(faults)
    rows = [_row(record, number, folder, faults) for number, record in records]
    faults += _duplicates(rows)
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
    lower = Counter(who.lower() for who in sides)
    if alike := sorted(who for who in sides if lower[who.lower()] > 1):
        faults.append(f"patients {alike} differ in case alone; are they one? Write each patient always alike")
    if split_by == "block" and given:
        faults.append(
            "has a split column, which cohort.split_by: block does not use; empty it, or set split_by: patient"
        )
    if not rows:
        faults.append("holds no slide; give each a line of its own below the names of the columns")
    if faults:
        raise _refusal(source, faults)
    if split_by == "block" or given:
        return rows
    drawn = [replace(row, split=draw_split(row.patient_id, fractions, seed)) for row in rows]
    if empty := [name for name in SPLITS if fractions[name] and name not in {row.split for row in drawn}]:
        raise MadError(
            f"{source}: {len(sides)} patients drawn at random leave the split(s) {empty} empty; give every slide its split "
            "in the `split` column (train, val or test), or use cohort.split_by: block for a handful of slides"
        )
    return drawn


def _refusal(source: str, faults: list[str]) -> MadError:
    return MadError(f"{source}: {len(faults)} fault(s)\n" + "\n".join(f"  {fault}" for fault in faults))


def _duplicates(rows: list[SlideRow]) -> list[str]:
    """Ids and files that occur twice. Files are compared by where links lead: a slide under two ids would train and be tested."""
    faults = []
    by_id: dict[str, list[str]] = {}
    by_file: dict[str, list[SlideRow]] = {}
    for row in rows:
        if row.slide_id:
            by_id.setdefault(row.slide_id.lower(), []).append(row.slide_id)
        if row.path:
            by_file.setdefault(os.path.realpath(row.path), []).append(row)
    for ids in by_id.values():
        if len(set(ids)) < len(ids):
            faults.append(f"slide_id {ids[0]!r} occurs {len(ids)} times; ids are unique")
        elif len(ids) > 1:
            faults.append(
                f"slide_ids {sorted(ids)} differ in case alone: on Windows and macOS their files would be the same"
            )
    for path, same in by_file.items():
        if len({row.slide_id for row in same}) > 1:
            patients = sorted({row.patient_id for row in same})
            faults.append(
                f"slides {sorted(row.slide_id for row in same)} are one file ({path})"
                + (f" of the patients {patients}" if len(patients) > 1 else "")
                + "; keep one of them"
            )
    return faults


def _row(record: Mapping[str, str], number: int, folder: Path, faults: list[str]) -> SlideRow:
    def cell(name: str) -> str | None:
        return (record.get(name) or "").strip() or None

    slide_id = cell("slide_id") or ""
    if not slide_id:
        faults.append(f"line {number}: slide_id is empty")
    elif not SLIDE_ID.fullmatch(slide_id):
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
    places = {name: str(folder / place) for name in ("path", "annotation") if (place := cell(name))}
    faults += [
        f"line {number}: {name} {place!r} holds a brace, where Snakemake would put something else; rename the file or folder"
        for name, place in places.items()
        if set("{}") & set(place)
    ]
    return SlideRow(
        slide_id=slide_id,
        path=places.get("path", ""),
        patient_id=cell("patient_id") or "",
        annotation=places.get("annotation"),
        mpp=mpp,
        split=split,
        site=cell("site"),
        scanner=cell("scanner"),
        stain=cell("stain"),
        targets={name: value for name, value in record.items() if name not in KNOWN},
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
