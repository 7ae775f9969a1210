"""Stage `evaluate`: the papers' protocols on the embeddings of one encoder, one JSON per protocol.

Reads cohort/, tile/, shard/ and embed/{encoder}/; writes evaluate/{encoder}/{protocol}.json for each of
`EvaluationConfig.protocols`, pca.parquet (Figure 3), segmentation.parquet (Figure 4) and patients.npz (sums per test patient,
from which `mad evidence` resamples). Tables and figures are drawn from these alone.
A protocol without data says `"status": "not applicable"` and why; a number that does not exist is null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad.config import Config
from mad.files import MadError, atomic_path, digest, read_json, read_parquet, sha256_file, write_json, write_parquet
from mad.progress import log
from mad.stages.segment import cohort_slides, paint_nothing, segmentation_report

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from mad.evaluation.data import Embedded
    from mad.evaluation.probe import Probe

SHOWN = 10  # pairs of slides that a warning lists


def run(config: Config, encoder: str) -> None:
    """Evaluate one encoder.

    Raises:
        MadError: the cohort, the shards or the embeddings are missing or contradict each other.
    """
    from mad.evaluation.classification import evaluate_classification
    from mad.evaluation.clustering import evaluate_clustering
    from mad.evaluation.consistency import evaluate_consistency
    from mad.evaluation.data import plain
    from mad.evaluation.label_free import slide_lines
    from mad.evaluation.magnification import evaluate_magnification
    from mad.evaluation.projection import projection
    from mad.evaluation.sites import evaluate_sites
    from mad.evaluation.transfer import evaluate_transfer
    from mad.tiles.embeddings import read_audit

    results = Path(config.results)
    folder = results / "evaluate" / encoder
    audit = read_audit(results / "embed" / encoder)
    if audit.get("status") == "absent":
        _write_absent(config, encoder, audit)
        return
    data = load(config, encoder)
    device = choose_device(config.evaluate.device)
    common = _common(config, encoder, data)
    log(f"evaluate {encoder}: {len(data.tiles)} tiles x {data.features.shape[1]}, {len(data.pairs)} parent-child pairs")

    _tell_duplicates(encoder, data)
    sums: dict[str, Any] = {}

    def save(protocol: str, compute: Callable[[], dict[str, Any]]) -> None:
        report = attempt(compute)
        by_patient = report.pop("by_patient", {})
        sums.update({f"{protocol}.{name}": values for name, values in by_patient.items()})
        write_json(folder / f"{protocol}.json", plain(common | {"protocol": protocol} | report))

    probes: list[Probe] = []

    def transfer() -> dict[str, Any]:
        report, probe = evaluate_transfer(data, config.evaluate, seed=config.seed, device=device)
        if probe is not None:
            probes.append(probe)
        return report

    def consistency() -> dict[str, Any]:
        report = evaluate_consistency(data, config.evaluate, seed=config.seed)
        if not report["labelled"]:
            for line in slide_lines(report["slides"]):
                log(f"evaluate {encoder}: {line}")
        coordinates, report["pca"] = projection(data, config.evaluate, seed=config.seed, device=device)
        write_parquet(folder / "pca.parquet", coordinates)
        return report

    (folder / "pca.parquet").unlink(missing_ok=True)
    save("classification", lambda: evaluate_classification(data, config.evaluate, seed=config.seed, device=device))
    save("clustering", lambda: evaluate_clustering(data, config.evaluate, seed=config.seed, device=device))
    save("consistency", consistency)
    save("transfer", transfer)
    save("magnification", lambda: evaluate_magnification(data, config.evaluate, seed=config.seed, device=device))
    save("sites", lambda: evaluate_sites(data, config.evaluate, seed=config.seed, device=device))
    save("segmentation", lambda: segmentation_report(config, encoder, probes, folder / "segmentation.parquet", device))
    if config.evaluate.reference:
        save("noninferiority", lambda: _noninferiority(config, encoder, data, device))
    if not (folder / "pca.parquet").exists():
        write_parquet(folder / "pca.parquet", _no_coordinates())
    _write_sums(folder, sums)


def _tell_duplicates(encoder: str, data: Embedded) -> None:
    """Name the slides that share pixels."""
    found = data.duplicates
    if found is None or not found.num_tiles:
        return
    log(
        f"evaluate {encoder}: WARNING: {found.num_tiles} tiles show the same pixels on two slides or in two splits; "
        f"{len(found.excluded)} of them were taken out of the test"
    )
    for line in found.slides[:SHOWN]:
        log(f"evaluate {encoder}: same pixels: {line}")
    if len(found.slides) > SHOWN:
        log(f"evaluate {encoder}: and {len(found.slides) - SHOWN} more pairs of slides")


def _noninferiority(config: Config, encoder: str, data: Embedded, device: str) -> dict[str, Any]:
    """An encoder against the reference that `evaluate.reference` names, and the one that `evaluate.against` does."""
    from mad.evaluation.data import NotApplicableError
    from mad.evaluation.noninferiority import evaluate_noninferiority
    from mad.tiles.embeddings import read_audit

    told: dict[str, Any] = {}
    sides: dict[str, Embedded] = {}
    for role, name in (("reference", config.evaluate.reference), ("against", config.evaluate.against)):
        if name and (role, name) != ("against", encoder):
            audit = read_audit(Path(config.results) / "embed" / name)
            if audit.get("status") != "absent":
                sides[role] = load(config, name)
                told |= {f"{role}_encoder": name, f"{role}_weights_sha256": audit.get("weights_sha256")}
            elif role == "reference":
                raise NotApplicableError(f"the reference {name} is absent: {audit['reason']}")
    return told | evaluate_noninferiority(data, **sides, config=config.evaluate, seed=config.seed, device=device)


def _write_absent(config: Config, encoder: str, audit: dict[str, Any]) -> None:
    """Every file of an encoder whose weights could not be had, saying so."""
    folder, classes = Path(config.results) / "evaluate" / encoder, list(config.label.classes)
    for protocol in config.evaluate.protocols:
        absent = {"encoder": encoder, "spec": audit["config"]["spec"], "protocol": protocol}
        write_json(folder / f"{protocol}.json", absent | {"status": "absent", "reason": audit["reason"]})
    write_parquet(folder / "pca.parquet", _no_coordinates())
    write_parquet(folder / "segmentation.parquet", paint_nothing(classes))
    _write_sums(folder, {})


def _write_sums(folder: Path, sums: dict[str, Any]) -> None:
    import numpy as np

    with atomic_path(folder / "patients.npz") as temporary:
        np.savez_compressed(temporary, **sums)


def load(config: Config, encoder: str) -> Embedded:
    """The embedded tiles of an encoder, joined with their labels and splits.

    Raises:
        MadError: a file is missing or contradicts another, or the embeddings do not fit into memory.
    """
    from mad.evaluation.data import assemble
    from mad.tiles.embeddings import map_array, read_audit, read_embeddings

    results = Path(config.results)
    embed = results / "embed" / encoder
    read_audit(embed)
    slides = cohort_slides(config)

    def per_slide() -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame, pd.DataFrame, Callable[[], NDArray]]]:
        for slide in slides["slide_id"]:
            shard = results / "shard" / f"{slide}.parquet"
            if not shard.exists():
                log(f"evaluate {encoder}: slide {slide} has no shards, left out")
                continue
            table = read_parquet(shard)
            if not len(table):
                continue
            yield (
                slide,
                table,
                read_parquet(results / "tile" / f"{slide}.parquet", ["tile_id", "label"]),
                read_embeddings(embed, slide)[0],
                partial(map_array, embed / f"{slide}.npy"),
            )

    return assemble(slides, per_slide(), classes=list(config.label.classes), background=config.label.background)


def attempt(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a protocol found, with `status` "ok", or "not applicable" and the `reason`."""
    from mad.evaluation.data import NotApplicableError

    try:
        return {"status": "ok", "reason": None} | compute()
    except NotApplicableError as missing:
        return {"status": "not applicable", "reason": str(missing)}


def _common(config: Config, encoder: str, data: Embedded) -> dict[str, Any]:
    """What every JSON says of its origin."""
    audit = Path(config.results) / "embed" / encoder / "audit.json"
    spec = next((entry.spec for entry in config.encoders if entry.name == encoder), None)
    return {
        "encoder": encoder,
        "spec": spec,
        "seed": config.seed,
        "split_by": data.split_by,
        "dim": int(data.features.shape[1]),
        "dropped": data.dropped,
        "duplicates": data.duplicates.facts() if data.duplicates else None,
        "sources": {
            "audit_sha256": sha256_file(audit),
            "weights_sha256": read_json(audit).get("weights_sha256"),
            "data_digest": _data_digest(data),
            "config_digest": digest(
                {"evaluate": config.evaluate.model_dump(exclude={"threads"}), "classes": config.label.classes}
            ),
        },
    }


def _data_digest(data: Embedded) -> str:
    """Digest of which tiles, on which side, of which class."""
    tiles = data.tiles.sort_values("tile_id")
    return digest([tiles["tile_id"].tolist(), tiles["split"].astype(str).tolist(), tiles["code"].tolist()])


def _no_coordinates() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(columns=["tile_id", "parent_id", "role", "label", "x", "y"])


def choose_device(wanted: str) -> str:
    """The device that `evaluate.device` means here.

    Raises:
        MadError: it is cuda, and there is none.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise MadError("evaluate.device is cuda, but torch sees no GPU here; set it to auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
