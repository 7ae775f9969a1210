"""What became of every slide of a cohort, in numbers: the facts behind the QC page, `qc.json` and the table of slides. Pure.

Focus is judged by the variance of the Laplacian that the shard table holds for each tile's native pixels: it depends on
stain and tissue as much as on the lens, so a tile counts as blurred only against the cohort's median at its magnification.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

TILE_COLUMNS = ["tile_id", "magnification", "status", "label", "tissue", "pen"]
SHARD_COLUMNS = ["tile_id", "split", "magnification", "status", "blur"]
BLURRED = 0.2
"""A tile is blurred below this share of the cohort's median variance of the Laplacian at its magnification."""
FOCUS_TISSUE = 0.5
"""Focus is read off tiles with at least this share of tissue: glass is never sharp."""
INKED = 0.1
"""A tile bears ink from this share of its area on."""
WARN_INK, WARN_BLUR = 0.005, 0.5
"""A slide is remarked on from this share of inked tissue, of blurred tiles."""
NO_TILE = "no tile was selected: too little tissue, caps of `sample:`, or too narrow for split_by: block"
Facts = dict[str, Any]


def slide_facts(
    row: Mapping[str, Any], told: Mapping[str, Any] | None, tiles: pd.DataFrame | None, shard: pd.DataFrame | None
) -> Facts:
    """One slide's facts, JSON-able; what is not known yet is null.

    Args:
        row: of the cohort table.
        told: content of tile/{slide}.json.
        tiles: TILE_COLUMNS of its tile table.
        shard: SHARD_COLUMNS of its shard table.

    Returns:
        `state` ("failed", "no tile", "ok", or "not made yet" before the slide's shards are cut), `cause` (null, or the tile
        job's words), `mend`, scale, counts of tiles per magnification and status, of labelled `ok` tiles per magnification and
        class, of distinct tiles in the shards per magnification and per split, of unreadable and of inked tiles, and
        `focus`: magnification -> variance of the Laplacian of each tile with tissue, an array, which `cohort_quality`
        replaces by numbers.
    """
    told = told or {}
    facts: Facts = {"slide_id": str(row["slide_id"]), "patient_id": str(row["patient_id"])}
    facts |= {key: _text(row.get(key)) for key in ("split", "site", "scanner", "stain")}
    facts["annotated"] = _text(row.get("annotation")) is not None
    facts |= {
        key: told.get(key) for key in ("mpp", "mpp_source", "width", "height", "tissue_share", "pen_share", "cause")
    }
    facts |= dict.fromkeys(("tiles", "labels", "labelled_share", "inked", "in_shards", "splits", "unreadable"))
    facts["focus"] = {}
    if tiles is not None:
        counts = tiles.groupby(["magnification", "status"]).size()
        facts["tiles"] = {
            f"{m:g}x": {status: int(counts.get((m, status), 0)) for status in ("ok", "blank", "edge")}
            for m in counts.index.unique(0)
        }
        ok = tiles[tiles["status"] == "ok"]
        facts["labels"] = _nested(ok.groupby(["magnification", "label"]).size())
        facts["labelled_share"] = float(tiles["label"].notna().mean()) if len(tiles) else None
        facts["inked"] = int((ok["pen"] >= INKED).sum())
    if shard is not None:
        stored = shard[shard["status"] == "ok"].drop_duplicates("tile_id")
        facts["in_shards"] = {f"{m:g}x": int(n) for m, n in stored.groupby("magnification").size().items()}
        facts["splits"] = {str(split): int(n) for split, n in stored.groupby("split").size().items()}
        facts["unreadable"] = int(shard.loc[shard["status"] == "unreadable", "tile_id"].nunique())
        if tiles is not None and len(stored):
            full = stored.merge(tiles.loc[tiles["tissue"] >= FOCUS_TISSUE, ["tile_id"]], on="tile_id")
            facts["focus"] = {f"{m:g}x": blur.to_numpy(float) for m, blur in full.groupby("magnification")["blur"]}
    facts["state"] = _state(told, facts)
    if facts["state"] == "no tile" and told.get("status") == "ok":
        facts["cause"] = "; ".join(filter(None, [facts["cause"], NO_TILE]))
    facts["mend"] = _mend(told, facts)
    return facts


def num_stored(facts: Facts) -> int | None:
    """Distinct tiles of a slide in the shards."""
    return None if facts["in_shards"] is None else sum(facts["in_shards"].values())


def cohort_quality(slides: Sequence[Facts], glass: str | None = None) -> dict[str, Any]:
    """The cohort's numbers, and its slides with `focus` in numbers and `warnings`: the content of `qc.json`.

    `glass` is the class that glass is labelled as, on annotated slides: a tile that has it owes that to no annotation.
    `focus` per magnification: `median`, and `blurred`, the share of tiles under BLURRED times the cohort's median, which is
    the median over slides of their medians: a slide counts once, however many tiles it has.
    """
    cohort_focus = {}
    for magnification in sorted({m for facts in slides for m in facts["focus"]}, key=_magnification):
        medians = [float(np.median(f["focus"][magnification])) for f in slides if magnification in f["focus"]]
        cohort_focus[magnification] = {"median": (median := float(np.median(medians))), "threshold": BLURRED * median}
    done = []
    for facts in slides:
        focus = {
            m: {
                "median": float(np.median(v)),
                "blurred": float((v < cohort_focus[m]["threshold"]).mean()),
                "tiles": len(v),
            }
            for m, v in facts["focus"].items()
        }
        done.append(facts | {"focus": focus, "warnings": _warnings(facts, focus, glass)})
    order = {"failed": 0, "no tile": 1, "not made yet": 2, "ok": 3}
    done.sort(key=lambda facts: (order[facts["state"]], not facts["warnings"], facts["slide_id"]))
    states = [facts["state"] for facts in done]
    return {
        "num_slides": len(done),
        "num_patients": len({facts["patient_id"] for facts in done}),
        "num_annotated": sum(facts["annotated"] for facts in done),
        "states": {state: states.count(state) for state in order},
        "num_warned": sum(bool(facts["warnings"]) for facts in done),
        "unreadable": sum(facts["unreadable"] or 0 for facts in done),
        "inked_slides": sum((facts["pen_share"] or 0) >= WARN_INK for facts in done),
        "mpp_sources": _counts(facts["mpp_source"] for facts in done if facts["mpp"]),
        "mpp_histogram": _counts(f"{facts['mpp']:.2g}" for facts in done if facts["mpp"]),
        "splits": _splits(done),
        "scales": _scales(done),
        "classes": _classes(done),
        "focus": cohort_focus,
        "slides": done,
    }


def exit_line(quality: Mapping[str, Any], page: str) -> str:
    """What a finished workflow says of its slides, in one line."""
    failed, empty = quality["states"]["failed"], quality["states"]["no tile"]
    where = f", {quality['num_warned']} with warnings: {page}" if quality["num_warned"] else f": {page}"
    if not failed and not empty:
        return f"{quality['num_slides']} slides, none failed{where}"
    return f"{failed} of {quality['num_slides']} slides failed, {empty} gave no tile{where}"


def _state(told: Mapping[str, Any], facts: Facts) -> str:
    if told.get("status") == "failed":
        return "failed"
    if facts["in_shards"] is None:
        return "not made yet"
    return "ok" if num_stored(facts) else "no tile"


def _mend(told: Mapping[str, Any], facts: Facts) -> str | None:
    """What to do about a slide that gave nothing."""
    if facts["state"] == "failed":
        return "Mend the file or its row of the cohort sheet as the cause says, and run again; only this slide is tiled anew."
    if facts["state"] != "no tile":
        return None
    if facts["unreadable"]:
        return "Every selected tile is unreadable: copy the slide anew from its source and run again."
    if told.get("status") == "no tissue":
        return (
            "Look at the picture. If there is tissue: tile.tissue.method `density` for pale stains, `texture` for unstained "
            "tissue and fat. If the slide is blank, take it off the sheet."
        )
    return (
        "Look at the picture. Lower tile.min_tissue for thin tissue; a slide smaller than one coarsest tile gives pairs only with "
        "a smaller tile.tile_px or a finer ladder; caps of 0 in `sample:` select nothing."
    )


def _warnings(facts: Facts, focus: Mapping[str, Mapping[str, float]], glass: str | None) -> list[str]:
    """Remarks on a slide that gave tiles."""
    if facts["state"] in ("failed", "no tile"):
        return []
    found = [facts["cause"]] if facts["cause"] else []
    if facts["unreadable"]:
        found.append(f"{facts['unreadable']} selected tiles are unreadable; their pairs are left out")
    if (facts["pen_share"] or 0) >= WARN_INK:
        found.append(f"pen marks on {facts['pen_share']:.1%} of the tissue ({facts['inked']} tiles)")
    for magnification, numbers in focus.items():
        if numbers["blurred"] >= WARN_BLUR:
            found.append(f"{numbers['blurred']:.0%} of the {magnification} tiles are blurred against the cohort")
    if facts["annotated"] and facts["labels"] is not None:
        names = {name for counts in facts["labels"].values() for name in counts} - {glass}
        if not names:
            found.append("annotated, but no tile got a label" + (f" other than {glass}" if facts["labels"] else ""))
    return found


def _splits(slides: Sequence[Facts]) -> dict[str, dict[str, int]]:
    """Split -> slides, patients and tiles. Under split_by: block a slide counts in every split that it has tiles in."""
    rows = [(split, f, n) for f in slides for split, n in (f["splits"] or {}).items()]
    rows += [(f["split"], f, 0) for f in slides if f["split"] and f["split"] not in (f["splits"] or {})]
    found: dict[str, dict[str, int]] = {}
    for split in sorted({split for split, _, _ in rows}, key=lambda s: ("train", "val", "test", s).index(s)):
        mine = [(f, n) for name, f, n in rows if name == split]
        patients = {f["patient_id"] for f, _ in mine}
        found[split] = {"slides": len(mine), "patients": len(patients), "tiles": sum(n for _, n in mine)}
    return found


def _scales(slides: Sequence[Facts]) -> dict[str, dict[str, int]]:
    """Magnification -> slides that have it, tiles by status, tiles in the shards."""
    names = {m for facts in slides for m in facts["tiles"] or {}}
    found = {}
    for magnification in sorted(names, key=_magnification):
        mine = [f for f in slides if magnification in (f["tiles"] or {})]
        found[magnification] = {
            "slides": len(mine),
            **{status: sum(f["tiles"][magnification][status] for f in mine) for status in ("ok", "blank", "edge")},
            "in shards": sum((f["in_shards"] or {}).get(magnification, 0) for f in mine),
        }
    return found


def _classes(slides: Sequence[Facts]) -> dict[str, dict[str, int]]:
    """Class -> slides that have it, and `ok` tiles per magnification."""
    found: dict[str, dict[str, int]] = {}
    for facts in slides:
        mine = facts["labels"] or {}
        for name in {name for counts in mine.values() for name in counts}:
            line = found.setdefault(name, {"slides": 0})
            line["slides"] += 1
            for magnification, counts in mine.items():
                line[magnification] = line.get(magnification, 0) + counts.get(name, 0)
    return dict(sorted(found.items()))


def _nested(counts: pd.Series) -> dict[str, dict[str, int]]:
    """Counts by (magnification, name) as magnification -> name -> count."""
    found: dict[str, dict[str, int]] = {}
    for (magnification, name), number in counts.items():
        found.setdefault(f"{magnification:g}x", {})[str(name)] = int(number)
    return found


def _counts(values: Any) -> dict[str, int]:
    return {str(name): int(n) for name, n in pd.Series(list(values), dtype=object).value_counts().sort_index().items()}


def _magnification(name: str) -> float:
    return float(name.removesuffix("x"))


def _text(value: Any) -> str | None:
    return None if value is None or pd.isna(value) or value == "" else str(value)
