"""Tiles from elsewhere through an encoder and the label-based protocols: `mad evaluate ENCODER --tiles TABLE.csv`.

Reads the table and its images, no slide; writes `{out}/{encoder}/`: embeddings.npy with tiles.parquet (its rows), the JSON of every
protocol, Tables 3-5 and those of scales and sites. Images and embeddings are kept for the next call (`mad.stages.tile_images`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mad.config import Config
from mad.files import sha256_file, write_json, write_parquet
from mad.progress import log


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
    reports = {}
    for name, compute in protocols.items():
        found = attempt(compute)
        found.pop("by_patient", None)  # sums that only `mad evidence` reads
        reports[name] = plain(common | {"protocol": name} | found)
        write_json(folder / f"{name}.json", reports[name])
        for what, told in ((name, reports[name]), ("Table 5", reports[name].get("table5"))):
            if told and told["status"] != "ok":
                log(f"{what}: {told['status']}: {told['reason']}")
    one = {encoder: reports}
    for made in (
        table3([encoder], one, data.classes),
        table4([encoder], one),
        table5([encoder], one),
        scale_table([encoder], one),
        site_table([encoder], one),
    ):
        write_table(folder / "tables", made)
    return folder / "tables"
