"""The cohort's QC page: one static HTML from the content of `qc.json`, what went wrong first. No script from elsewhere.

It lies in `report/` and links the pictures of `../tile/`, which a browser loads only when they come into view.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mad.reporting.quality import BLURRED, INKED, num_stored
from mad.reporting.web import render


def qc_page(quality: Mapping[str, Any]) -> str:
    """The page as HTML. Whatever comes from the cohort sheet, a slide or an error is escaped.

    Args:
        quality: as `mad.reporting.quality.cohort_quality` gives it.
    """
    slides, scales = quality["slides"], quality["scales"]
    magnifications = list(scales)
    heads = ["Slide", "State", "Patient", "Split", "Site", "Scanner", "Stain", "µm/px", "Scale from", "Tissue %"]
    heads += [*(f"ok {m}" for m in magnifications), "In shards", "Labelled %", "Unreadable", "Ink on tissue %", "Inked"]
    heads += [f"{what} {m}" for m in quality["focus"] for what in ("Focus", "Blurred %")]
    return render(
        "qc.html",
        q=quality,
        number=_number,
        blurred=BLURRED,
        inked=INKED,
        bad=[s for s in slides if s["state"] in ("failed", "no tile")],
        warned=[s for s in slides if s["warnings"]],
        splits=[(name, *line.values()) for name, line in quality["splits"].items()],
        scales=[(name, *line.values()) for name, line in scales.items()],
        magnifications=magnifications,
        classes=[(n, c["slides"], *(c.get(m, 0) for m in magnifications)) for n, c in quality["classes"].items()],
        focus=[(name, *line.values()) for name, line in quality["focus"].items()],
        mpp_most=max(quality["mpp_histogram"].values(), default=1),
        heads=heads,
        lines=[(s["state"], _line(s, magnifications, list(quality["focus"]))) for s in slides],
    )


def _line(facts: Mapping[str, Any], magnifications: list[str], focused: list[str]) -> list[Any]:
    """A slide's cells of the big table: texts, and numbers in what their column prints."""
    cells = [facts[key] for key in ("slide_id", "state", "patient_id", "split", "site", "scanner", "stain")]
    cells += [facts["mpp"], facts["mpp_source"], _percent(facts["tissue_share"])]
    cells += [(facts["tiles"] or {}).get(magnification, {}).get("ok") for magnification in magnifications]
    cells += [num_stored(dict(facts)), _percent(facts["labelled_share"]), facts["unreadable"]]
    cells += [_percent(facts["pen_share"]), facts["inked"]]
    for magnification in focused:
        numbers = facts["focus"].get(magnification)
        cells += [None, None] if numbers is None else [numbers["median"], _percent(numbers["blurred"])]
    return [float(f"{cell:.4g}") if isinstance(cell, float) else cell for cell in cells]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _number(value: Any) -> str:
    """Counts with separators, other numbers to four digits, null as a dash; texts as they are."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
