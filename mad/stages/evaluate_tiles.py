"""Tiles from elsewhere through an encoder and the label-based protocols: `mad evaluate ENCODER --tiles TABLE.csv`.

Reads the table and its images, no slide; writes `{out}/{encoder}/`: embeddings.npy with tiles.parquet (its rows), the JSON of every
protocol. `{out}/tables/` has Tables 3-5 and those of scales and sites, with a row per encoder that was evaluated on the same images
with the same settings. Images and embeddings are kept for the next call (`mad.stages.tile_images`).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mad.config import Config
from mad.files import digest, read_json, sha256_file, write_json, write_parquet
from mad.progress import log
from mad.reporting.from_json import Reports


def run(config: Config, encoder: str, table_path: Path, out: Path) -> Path:
    """Embed and evaluate the tiles of a table with one encoder; returns the folder of the tables.

    Raises:
        MadError: the table, an image or the encoder is at fault.
    """
    from mad.evaluation.classification import evaluate_classification
    from mad.evaluation.clustering import evaluate_clustering
    from mad.evaluation.consistency import evaluate_consistency
    from mad.evaluation.data import plain
    from mad.evaluation.magnification import evaluate_magnification
    from mad.evaluation.sites import evaluate_sites
    from mad.evaluation.tile_table import check_images, embedded_tiles, read_tile_table, uniform_twins
    from mad.evaluation.transfer import evaluate_transfer
    from mad.models.encoders import load_encoder
    from mad.reporting.scale_tables import scale_table, site_table
    from mad.reporting.tables import table3, table4, table5
    from mad.stages.evaluate import attempt, choose_device
    from mad.stages.report import write_table
    from mad.stages.tile_images import embed_images, look_at_images

    table = read_tile_table(
        table_path,
        fractions=config.cohort.split.model_dump(),
        seed=config.seed,
        magnifications=config.tile.magnifications,
        tolerance=config.tile.scale_tolerance,
    )
    paths = [table_path.parent / name for name in table["path"]]
    facts = look_at_images(paths, out / "images.parquet")
    side = check_images(table, facts)
    sized = config.model_copy(update={"tile": config.tile.model_copy(update={"tile_px": side})})
    model, folder = load_encoder(sized, encoder), out / encoder
    features = embed_images(model, encoder, paths, facts["sha256"], config.encoder(encoder).batch, folder)
    write_parquet(folder / "tiles.parquet", table)

    data = embedded_tiles(table, features, config.label.background)
    device, settings = choose_device(config.evaluate.device), config.evaluate
    protocols: dict[str, Any] = {
        "classification": lambda: evaluate_classification(data, settings, seed=config.seed, device=device),
        "clustering": lambda: evaluate_clustering(data, settings, seed=config.seed, device=device),
        "consistency": lambda: evaluate_consistency(data, settings, seed=config.seed),
        "transfer": lambda: evaluate_transfer(data, settings, seed=config.seed, device=device)[0],
        "magnification": lambda: evaluate_magnification(data, settings, seed=config.seed, device=device),
        "sites": lambda: evaluate_sites(data, settings, seed=config.seed, device=device),
    }
    common = {
        "encoder": encoder, "spec": config.encoder(encoder).spec, "seed": config.seed, "split_by": "patient",
        "dim": features.shape[1], "dropped": {}, "audit": model.audit, "table_sha256": sha256_file(table_path),
        "duplicates": {"uniform": uniform_twins(table, facts)},
    }  # fmt: skip
    asked = [settings.model_dump(exclude={"device", "threads"}), config.seed, config.label.background]
    common["compared_by"] = digest([table.to_csv(), facts["sha256"].tolist(), *asked])
    for name, compute in protocols.items():
        found = attempt(compute)
        found.pop("by_patient", None)  # sums that only `mad evidence` reads
        report = plain(common | {"protocol": name} | found)
        write_json(folder / f"{name}.json", report)
        for what, part in ((name, report), ("Table 5", report.get("table5"))):
            if part and part["status"] != "ok":
                log(f"{what}: {part['status']}: {part['reason']}")
    reports = _compared(out, [entry.name for entry in config.encoders], protocols, common["compared_by"])
    names = list(reports)
    for made in (
        table3(names, reports, data.classes),
        table4(names, reports),
        table5(names, reports),
        scale_table(names, reports),
        site_table(names, reports),
    ):
        write_table(out / "tables", made)
    return out / "tables"


def _compared(out: Path, configured: list[str], protocols: Collection[str], compared_by: str) -> Reports:
    """The JSON of every encoder in `out` that has the same `compared_by`; those of the configuration first, in its order."""
    reports: Reports = {}
    others = sorted({path.parent.name for path in out.glob("*/*.json")} - set(configured))
    for encoder in (*configured, *others):
        paths = [path for name in protocols if (path := out / encoder / f"{name}.json").exists()]
        found = {path.stem: read_json(path) for path in paths}
        if same := {name: report for name, report in found.items() if report.get("compared_by") == compared_by}:
            reports[encoder] = same
        if len(same) < len(found):
            log(f"{encoder}: not compared: other tiles or settings; `mad evaluate {encoder} --tiles` evaluates it anew")
    return reports
