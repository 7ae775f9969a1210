"""The sheet of the synthetic cohort. Standard library only: it is read while Snakemake parses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mad.slides.synthetic.targets import target_columns

if TYPE_CHECKING:
    from mad.config.synthetic import SyntheticConfig

SCANNERS = ("Aquila", "Borealis")
TARGET = "plaque_in_band"


def slide_index(slide_id: str) -> int:
    """Zero-based number of a slide: `S01` is 0.

    Raises:
        ValueError: no id of this cohort.
    """
    if not (slide_id.startswith("S") and slide_id[1:].isdecimal() and int(slide_id[1:]) >= 1):
        raise ValueError(f"{slide_id!r} is no slide of the synthetic cohort; its ids are S01, S02, ...")
    return int(slide_id[1:]) - 1


def is_positive(index: int) -> bool:
    """Whether the plaques of this slide lie inside the band of distinct architecture (the slide-level target)."""
    return index % 2 == 1


def scanner(index: int) -> str:
    """The scanner of a slide; it changes every other slide, so that it tells nothing of the target."""
    return SCANNERS[index // 2 % len(SCANNERS)]


def split_sizes(patients: int) -> tuple[int, int, int]:
    """Patients that train, validate and test: 8 : 1 : 3 of twelve, and at least one each from three patients on."""
    if patients < 3:
        return 1, 0, patients - 1
    test, val = max(1, round(patients / 4)), max(1, round(patients / 12))
    return patients - test - val, val, test


def sheet_rows(config: SyntheticConfig) -> list[dict[str, str]]:
    """The cohort sheet, one row per slide and patient; paths are relative to the sheet's folder.

    A slide's id, pixels and target depend on its number alone, so a larger cohort holds the smaller one.
    """
    _, val, test = split_sizes(config.patients)
    val = val if config.val_patients is None else config.val_patients
    train = config.patients - val - (test if config.test_patients is None else config.test_patients)
    rows = []
    for index in range(config.patients):
        slide_id = f"S{index + 1:02d}"
        rows.append(
            {
                "slide_id": slide_id,
                "path": f"{slide_id}.tiff",
                "patient_id": f"P{index + 1:02d}",
                "annotation": f"{slide_id}.geojson",
                "split": "train" if index < train else "val" if index < train + val else "test",
                "scanner": scanner(index),
                "stain": "H&E",
                TARGET: str(int(is_positive(index))),
                **(target_columns(config, index) if config.targets else {}),
            }
        )
    return rows
