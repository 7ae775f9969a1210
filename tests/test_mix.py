"""Stage mix: from embeddings to contextual tokens; resumption, patients, the files that others read."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fake_regions import fake_regions
from pipeline import configure, run_all

from mad.config import Config, parse_config
from mad.files import MadError, read_json, sha256_file, write_json
from mad.models.mixer import load_mixer
from mad.slides.sheet import write_sheet
from mad.stages import embed, mix
from mad.tiles.pyramid import parse_tile_id
from mad.training import mixing
from mad.training.region_data import CHUNK, mean_and_std, read_regions

SLIDES = {"A": "train", "B": "train", "C": "train", "D": "val", "E": "test"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = fake_regions(tmp_path_factory.mktemp("mix"), SLIDES)
    mix.run(config, "mma")
    return config


def folder_of(config: Config) -> Path:
    return Path(config.results) / "mix" / "mma"


def weights(config: Config) -> str:
    return sha256_file(folder_of(config) / "mixer" / "model.safetensors")


def test_the_files_are_as_the_contract_says(finished: Config) -> None:
    """docs/data-contracts.md: columns, types, order, and every `ok` tile once."""
    folder = folder_of(finished)
    for slide in SLIDES:
        tokens, table = np.load(folder / f"{slide}.npy"), pd.read_parquet(folder / f"{slide}.parquet")
        assert tokens.dtype == np.float32 and tokens.shape == (len(table), 32)
        assert {name: str(kind) for name, kind in table.dtypes.items()} == mix.TOKEN_TYPES
        assert list(mix.TOKEN_TYPES) == ["region", "token", "tile_id", "magnification", "x_um", "y_um"]
        tiles = pd.read_parquet(Path(finished.results) / "tile" / f"{slide}.parquet")
        assert sorted(table["tile_id"].dropna()) == sorted(tiles["tile_id"][tiles["status"] == "ok"])
        own = table["token"] == "region"
        assert (table["tile_id"].isna() == own).all() and (table["magnification"].isna() == own).all()
        assert table["region"][own].is_unique and set(table["token"]) == {"region", "tile"}
        for region, part in table.groupby("region"):
            assert part["token"].iloc[0] == "region" and (np.diff(part.index) == 1).all()
            index = parse_tile_id(region)[1]
            assert all(parse_tile_id(name)[1][:2] == index for name in part["tile_id"].iloc[1:])
            side = 0.25 * 4 * 16
            assert part[["x_um", "y_um"]].iloc[0].tolist() == [(index[1] + 0.5) * side, (index[0] + 0.5) * side]
    summary = read_json(folder / "summary.json")
    assert summary["status"] == "ok" and summary["weights_sha256"] == weights(finished)
    regions = [pd.read_parquet(folder / f"{slide}.parquet")["token"].eq("region").sum() for slide in "ABC"]
    assert summary["splits"]["train"] == sum(regions) > 20
    assert {"recipe.json", "curves.png", "metrics.jsonl", "checkpoints", "mixer"} <= {p.name for p in folder.iterdir()}


def test_the_contract_lists_the_columns() -> None:
    text = (Path(__file__).parents[1] / "docs" / "data-contracts.md").read_text()
    section = text.split("\n## Mixer")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    kinds = {name.strip("` "): row[2].strip() for row in rows for name in row[1].split(",")}
    assert kinds == {name: {"string": "string", "float64": "float"}[kind] for name, kind in mix.TOKEN_TYPES.items()}


def test_tokens_are_those_of_the_saved_mixer(finished: Config) -> None:
    """Region by region and alone, by way of the public loader: padding and neighbours in a batch change nothing."""
    mixer, slide = load_mixer(folder_of(finished) / "mixer"), read_regions(finished, finished.mixer("mma"), "E")
    tokens, done = np.load(folder_of(finished) / "E.npy"), 0
    for number in range(len(slide)):
        region, tiles = mixer(mixing.read_batch([(slide, number)]))
        both = torch.cat([region, tiles[0]]).detach().numpy()
        assert np.abs(tokens[done : done + len(both)] - both).max() < 1e-5
        done += len(both)
    assert done == len(tokens)


def test_hidden_tiles_are_told_from_the_others(finished: Config) -> None:
    """On unseen patients the trained mixer predicts hidden tiles better than the region's mean and than random weights."""
    summary = read_json(folder_of(finished) / "summary.json")
    random = fake_regions(folder_of(finished).parent / "random", SLIDES, steps=0)
    mix.run(random, "mma")
    control = read_json(folder_of(random) / "summary.json")
    assert control["steps"] == 0 and control["loss"] == {}
    for kind in ("random", "tube", "magnification"):
        held = summary["held_out"][kind]
        assert held["loss"] < held["reference"] - 0.05 and held["loss"] < control["held_out"][kind]["loss"] - 0.1, kind
        assert held["reference"] == control["held_out"][kind]["reference"]
    records = mixing.trim_metrics(folder_of(finished) / "metrics.jsonl", 60)
    assert [r["step"] for r in records] == list(range(60)) and [r["step"] for r in records if "health" in r] == [
        19,
        39,
        59,
    ]


def test_a_stopped_and_resumed_run_ends_bit_equal(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = fake_regions(tmp_path, SLIDES), mixing.append_lines

    def kill_at_33(path: Path, lines: list[str]) -> None:
        real(path, lines)
        if '"step": 33,' in lines[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(mixing, "append_lines", kill_at_33)
    with pytest.raises(SystemExit) as left:
        mix.run(config, "mma")
    assert left.value.code == 75 and not (folder_of(config) / "summary.json").exists()
    assert not (folder_of(config) / "mixer").exists()
    monkeypatch.setattr(mixing, "append_lines", real)
    mix.run(config, "mma")
    assert weights(config) == weights(finished)
    one, other = (mixing.trim_metrics(folder_of(c) / "metrics.jsonl", 60) for c in (config, finished))
    assert [r["loss"] for r in one] == [r["loss"] for r in other]


def test_only_patients_who_train_teach(finished: Config, tmp_path: Path) -> None:
    """Other embeddings of the test slide: the same weights, not trained again; of a training slide: another run, the first kept."""
    shutil.copytree(Path(finished.results).parent, tmp_path / "copy")
    config = parse_config({**finished.model_dump(), "results": str(tmp_path / "copy" / "results")})
    first, trained = weights(config), (folder_of(config) / "mixer" / "provenance.json").stat().st_mtime_ns
    before = np.load(folder_of(config) / "E.npy")

    def disturb(slide: str) -> None:
        dense = Path(config.results) / "embed" / "tiles" / "dense"
        np.save(dense / f"{slide}.npy", 2 - np.load(dense / f"{slide}.npy"))
        write_json(dense / f"{slide}.json", {"key": "other"})

    disturb("E")
    mix.run(config, "mma")
    assert (folder_of(config) / "mixer" / "provenance.json").stat().st_mtime_ns == trained
    assert np.abs(np.load(folder_of(config) / "E.npy") - before).max() > 0.1
    disturb("A")
    mix.run(config, "mma")
    assert weights(config) != first
    (archived,) = (folder_of(config) / "archive").iterdir()
    assert sha256_file(archived / "mixer" / "model.safetensors") == first


def test_patients_who_change_sides_train_it_anew(finished: Config, tmp_path: Path) -> None:
    """Two of them swap train and val: the same slides and embeddings, another run."""
    shutil.copytree(Path(finished.results).parent, tmp_path / "copy")
    sheet = tmp_path / "copy" / "slides.tsv"
    swapped = SLIDES | {"A": SLIDES["D"], "D": SLIDES["A"]}
    write_sheet(sheet, [{"slide_id": s, "path": f"{s}.tiff", "patient_id": s, "split": p} for s, p in swapped.items()])
    value = finished.model_dump() | {"results": str(tmp_path / "copy" / "results")}
    config = parse_config(value | {"cohort": {"sheet": str(sheet)}})
    first = weights(config)
    mix.run(config, "mma")
    assert weights(config) != first
    fresh = fake_regions(tmp_path / "fresh", swapped)
    mix.run(fresh, "mma")
    assert weights(config) == weights(fresh)
    (archived,) = (folder_of(config) / "archive").iterdir()
    assert sha256_file(archived / "mixer" / "model.safetensors") == first


def test_statistics_are_of_the_train_split(finished: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = finished.mixer("mma")
    slides = [read_regions(finished, entry, slide) for slide, split in SLIDES.items() if split == "train"]
    stacked = np.concatenate([s.vectors[s.row] for s in slides]).astype(np.float64)
    scale = np.concatenate([s.scale for s in slides])
    mixer = load_mixer(folder_of(finished) / "mixer")
    for s in range(2):
        assert np.allclose(mixer.mean[s], stacked[scale == s].mean(0), atol=1e-5)
        assert np.allclose(mixer.std[s], stacked[scale == s].std(0), atol=1e-5)
    monkeypatch.setattr("mad.training.region_data.CHUNK", 7)
    assert CHUNK > 7 and all(
        torch.allclose(a, b) for a, b in zip(mean_and_std(slides, 2), (mixer.mean, mixer.std), strict=True)
    )


LITERAL = {"attention": "place", "masks": {"random": 0, "tube": 0, "magnification": 1}}


@pytest.mark.parametrize("changes", [{"contrastive": 0.5, "pooling": "mean"}, LITERAL])
def test_variants_learn(tmp_path: Path, changes: dict[str, object]) -> None:
    config = fake_regions(tmp_path, SLIDES, **changes)
    mix.run(config, "mma")
    summary = read_json(folder_of(config) / "summary.json")
    records = mixing.trim_metrics(folder_of(config) / "metrics.jsonl", 60)
    assert summary["loss"]["mem"] < records[0]["mem"] - 0.1
    assert ("contrastive" in summary["loss"]) == ("contrastive" in changes)
    if "contrastive" in changes:
        assert summary["loss"]["loss"] == pytest.approx(summary["loss"]["mem"] + 0.5 * summary["loss"]["contrastive"])
        assert summary["loss"]["contrastive"] < records[0]["contrastive"] - 0.1
    else:
        assert set(summary["held_out"]) == {"magnification"}


def test_an_absent_encoder_and_faults(tmp_path: Path) -> None:
    config = fake_regions(tmp_path, {"A": "train", "B": "test"}, size=1)
    with pytest.raises(MadError, match="1 regions of the train split hold two tiles or more"):
        mix.run(config, "mma")
    dense = Path(config.results) / "embed" / "tiles" / "dense"
    (dense / "B.json").unlink()
    with pytest.raises(MadError, match=r"B.npy: not embedded whole; run `mad embed` for encoder 'tiles'"):
        mix.run(config, "mma")
    write_json(dense.parent / "audit.json", {"status": "absent", "reason": "gated"})
    mix.run(config, "mma")
    assert read_json(folder_of(config) / "summary.json") == {"status": "absent", "reason": "gated", "name": "mma"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": "other"}, r"mixes the encoder 'other'; encoders has \['tiles'\]"),
        ({"magnifications": [2.5, 20]}, r"names \[20.0\]; the ladder is \[2.5, 10.0\]"),
        ({"magnifications": [10]}, "needs two magnifications"),
        ({"width": 30}, r"width \(30\) must divide by heads \(4\)"),
        ({"warmup": 60}, "must be shorter than steps"),
    ],
)
def test_a_wrong_key_is_named(finished: Config, changes: dict[str, object], said: str) -> None:
    value = finished.model_dump()
    value["mixers"] = [{**value["mixers"][0], **changes}]
    with pytest.raises(MadError, match=said):
        parse_config(value)


def test_from_the_slides(slides: Path, tmp_path: Path) -> None:
    """An encoder that a mixer names embeds every `ok` tile at its magnifications, and the mapped slide's blank ones beside."""
    colour = {"encoders": [{"name": "colour", "spec": "colour"}], "evaluate": {"segmentation_num_slides": 1}}
    mixer = {"name": "mma", "encoder": "colour", "magnifications": [10, 40], "width": 16, "depth": 1, "heads": 2}
    config = configure(tmp_path, slides, **colour, mixers=[{**mixer, "steps": 4, "warmup": 1, "batch": 4}])
    folder = run_all(config)
    embed.run(config, "colour")
    for slide, mapped in (("S01", False), ("S02", True)):
        tiles = pd.read_parquet(folder / "tile" / f"{slide}.parquet")
        used = tiles["magnification"] > 2.5  # by the mixer and by the maps
        wanted = used & ((tiles["status"] == "ok") | (mapped & (tiles["status"] != "edge")))
        dense = pd.read_parquet(folder / "embed" / "colour" / "dense" / f"{slide}.parquet")
        assert sorted(dense["tile_id"]) == sorted(tiles["tile_id"][wanted])
    assert (pd.read_parquet(folder / "tile" / "S02.parquet")["status"] == "blank").any()
    mix.run(config, "mma")
    table = pd.read_parquet(folder / "mix" / "mma" / "S01.parquet")
    assert set(table["magnification"].dropna()) == {10.0, 40.0} and table["region"].str.startswith("S01_L1_0_0_").all()
