"""The end-to-end part of stage biomarkers: from slides to the same files as any aggregator, resumable fold by fold."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tiff
from fakes import tiny_run
from pipeline import run_all

from mad.config import Config, parse_config
from mad.config.regions import region_magnifications
from mad.files import MadError, read_json, read_parquet, write_json
from mad.models.encoders import load_encoder
from mad.slides.sheet import write_sheet
from mad.stages import biomarker_report, biomarkers, embed, end_to_end
from mad.stages.slide_tokens import SlideTokens
from mad.stages.tile_pixels import TilePixels

PATIENTS = 12
FINETUNE = {"lr": 1e-3, "warmup": 1}


def configure(folder: Path, **finetune: Any) -> Config:
    """Two magnifications of tiny tiles, an untrained encoder, frozen and learning."""
    return parse_config(
        {
            "results": str(folder / "results"),
            "cohort": {"sheet": str(folder / "slides.tsv")},
            "tile": {"tile_px": 16, "magnifications": [10, 40], "tissue": {"min_area_um2": 0}},
            "sample": {"max_pairs": {"10x-40x": 0}, "max_standalone": {"10x": 1, "40x": 0}},
            "runs": [tiny_run(name="net", backbone={"model": "test_vit", "args": {"patch_size": 8}})],
            "encoders": [{"name": "enc", "spec": "random:net", "precision": "fp32"}, {"name": "colour", "spec": "colour"}],
            "evaluate": {"transition": [10, 40], "segmentation_magnifications": [10, 40], "segmentation_num_slides": 0,
                         "bootstrap_resamples": 50},
            "biomarkers": {
                "targets": [{"name": "t", "column": "grade"}, {"name": "number", "column": "number", "task": "regression"}],
                "aggregators": [
                    {"name": "frozen", "encoder": "enc", "tokens": "coarsest"},
                    {"name": "tuned", "encoder": "enc", "tokens": "coarsest", "finetune": FINETUNE | finetune},
                ],
                "folds": 5, "repeats": 1, "steps": 6, "check_every": 2, "hidden": 8, "batch": 4, "tile_shares": [1.0, 0.5],
                "baseline": "frozen",
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of twelve slides of 6 coarse and 96 fine tiles, embedded."""
    folder, records = tmp_path_factory.mktemp("end_to_end"), []
    for n in range(PATIENTS):
        rng = np.random.default_rng(n)
        pixels = rng.integers(0, 60, (128, 192, 3)) + np.array([170, 90, 140 + 40 * (n % 2)])
        levels = [pixels.astype(np.uint8), pixels.reshape(32, 4, 48, 4, 3).mean((1, 3)).astype(np.uint8)]
        write_tiff(folder / f"S{n}.tiff", levels, mpp=0.25)
        records.append({"slide_id": f"S{n}", "path": str(folder / f"S{n}.tiff"), "patient_id": f"P{n}",
                        "split": "train" if n else "test", "grade": str(n % 2), "number": str(n)})  # fmt: skip
    write_sheet(folder / "slides.tsv", records)
    config = configure(folder)
    run_all(config)
    embed.run(config, "enc")
    return folder


def run(config: Config, name: str = "tuned", target: str = "t") -> tuple[dict, Any, Any]:
    biomarkers.run(config, target, name)
    folder = Path(config.results) / "biomarkers" / target
    tables = [read_parquet(folder / part / f"{name}.parquet") for part in ("", "attention")]
    return read_json(folder / f"{name}.json"), *tables


@pytest.mark.parametrize("target", ["t", "number"])
def test_it_writes_what_every_aggregator_writes(made: Path, target: str):
    config = configure(made)
    (one, frozen, _), (report, tuned, attention) = run(config, "frozen", target), run(config, "tuned", target)
    assert set(report) == set(one) and set(report["by_share"]) == {"1", "0.5"}
    assert tuned.columns.tolist() == frozen.columns.tolist() and len(tuned) == len(frozen) == 2 * PATIENTS
    keys = ["slide_id", "share", "repeat", "fold", "truth", "tokens", "tiles"]
    assert tuned[keys].equals(frozen[keys])
    scores = [name for name in tuned if name.startswith("score_")]
    assert not np.allclose(tuned[scores], frozen[scores], atol=1e-4)
    assert attention.groupby("slide_id")["attention"].sum().to_numpy() == pytest.approx(np.ones(PATIENTS), abs=1e-5)
    for head, other in zip(report["heads"], one["heads"], strict=True):
        assert head["encoder_change"] > 0 and head["steps"] in (2, 4, 6)
        assert {**head, "steps": 0} == {**other, "steps": 0, "encoder_change": head["encoder_change"]}
    assert "finetune" in report["rules"] and "finetune" not in one["rules"]
    assert report["aggregator"]["finetune"]["lr"] == 1e-3 and one["aggregator"]["finetune"] is None
    assert report["source"]["weights_sha256"] == load_encoder(config, "enc").audit["weights_sha256"]


def test_the_report_sets_it_beside_the_frozen_one(made: Path):
    config = configure(made)
    for target in ("t", "number"):
        for name in ("frozen", "tuned"):
            biomarkers.run(config, target, name)
    biomarker_report.run(config)
    found = read_json(made / "results" / "report" / "biomarkers.json")
    assert (
        found["baseline"] == "frozen" and "difference" in found["targets"]["t"]["aggregators"]["tuned"]["by_share"]["1"]
    )
    table = (made / "results" / "report" / "tables" / "biomarkers.md").read_text()
    assert "tuned" in table and "finetune: the encoder learns with its attention head" in table
    assert (made / "results" / "report" / "figures" / "attention_tuned.png").exists()


def test_without_a_learning_rate_it_is_the_frozen_row(made: Path):
    config = configure(made, lr=0, turns=False)
    (one, frozen, seen), (report, tuned, attention) = run(config, "frozen"), run(config)
    assert [head["steps"] for head in report["heads"]] == [head["steps"] for head in one["heads"]]
    assert {head["encoder_change"] for head in report["heads"]} == {0}
    np.testing.assert_allclose(tuned["score_1"], frozen["score_1"], atol=2e-3)
    np.testing.assert_allclose(attention["attention"], seen["attention"], atol=2e-3)


def test_an_interrupted_job_goes_on_with_its_fold(made: Path, monkeypatch: pytest.MonkeyPatch):
    config = configure(made, lr=2e-3)
    whole = run(config)
    shutil.rmtree(made / "results" / "biomarkers" / "t" / "folds")
    real, done = end_to_end.fit_finetuned, []

    def stopped(*given: Any, **named: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(named["seed"])
        return real(*given, **named)

    monkeypatch.setattr(end_to_end, "fit_finetuned", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(
        end_to_end, "fit_finetuned", lambda *a, **named: done.append(named["seed"]) or real(*a, **named)
    )
    again = run(config)
    assert len(done) == len(set(done)) == 5
    assert again[0] == whole[0] and again[1].equals(whole[1]) and again[2].equals(whole[2])


def test_other_settings_train_anew(made: Path, monkeypatch: pytest.MonkeyPatch):
    run(configure(made, lr=3e-3))
    real, done = end_to_end.fit_finetuned, []
    monkeypatch.setattr(end_to_end, "fit_finetuned", lambda *a, **named: done.append(1) or real(*a, **named))
    run(configure(made, lr=3e-3, cache_gb=0, checkpointing=False))
    assert len(done) == 0
    run(configure(made, lr=4e-3))
    assert len(done) == 5


def test_other_shares_of_the_tiles_predict_and_train_nothing(made: Path, monkeypatch: pytest.MonkeyPatch):
    config = configure(made, lr=5e-3)
    whole = run(config)
    values = config.model_dump()
    values["biomarkers"]["tile_shares"] = [1.0, 0.3]
    monkeypatch.setattr(end_to_end, "fit_finetuned", None)  # nothing is trained
    again = run(parse_config(values))
    assert set(again[0]["by_share"]) == {"1", "0.3"} and again[0]["heads"] == whole[0]["heads"]
    assert again[1].query("share == 1").equals(whole[1].query("share == 1"))


def test_a_slide_whose_pixels_changed_trains_anew_and_folds_that_are_no_more_are_gone(
    made: Path, monkeypatch: pytest.MonkeyPatch
):
    config = configure(made, lr=6e-3)
    run(config)
    folds = made / "results" / "biomarkers" / "t" / "folds" / "tuned"
    (folds / "1-0.safetensors").write_bytes(b"of a second repeat")
    real, done = end_to_end.fit_finetuned, []
    monkeypatch.setattr(end_to_end, "fit_finetuned", lambda *a, **named: done.append(1) or real(*a, **named))
    slide = made / "S3.tiff"
    before = slide.read_bytes(), slide.stat()
    write_tiff(slide, [np.full((128, 192, 3), 150, np.uint8), np.full((32, 48, 3), 150, np.uint8)], mpp=0.25)
    embed.run(config, "enc")  # the same tiles of the same names
    run(config)
    slide.write_bytes(before[0])
    os.utime(slide, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
    embed.run(config, "enc")
    assert len(done) == 5
    assert sorted(path.name for path in folds.iterdir()) == [f"0-{fold}.safetensors" for fold in range(5)]


def test_pixels_are_those_that_were_embedded(made: Path):
    config = configure(made)
    encoder, entry = load_encoder(config, "enc"), config.biomarkers.aggregator("tuned")
    assert region_magnifications(config, "enc") == [10] and region_magnifications(config, "colour") == []
    finest = entry.model_copy(update={"tokens": "finest"})
    assert not len(SlideTokens(config, finest).read("S3"))  # embedded at 10x alone, as asked
    for tokens in ("coarsest", "finest", "all"):
        entry = entry.model_copy(update={"tokens": tokens})
        asked = config.biomarkers.model_copy(update={"aggregators": [entry]})
        embed.run(config.model_copy(update={"biomarkers": asked}), "enc")
        bag = SlideTokens(config, entry).read("S3")
        assert len(bag) == {"coarsest": 6, "finest": 96, "all": 102}[tokens]
        for cache in (0.0, 1.0):
            pixels = TilePixels(config, cache)
            np.testing.assert_allclose(encoder(pixels(bag)), bag.take(), atol=1e-4)
            places = np.array([4, 0, 5])
            assert np.array_equal(pixels(bag, places), pixels(bag)[places]) and (not pixels._whole) == (cache == 0)


def test_faults_are_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = configure(made)
    audit = made / "results" / "embed" / "enc" / "audit.json"
    told = read_json(audit)
    write_json(audit, {**told, "weights_sha256": "0" * 64})
    with pytest.raises(
        MadError,
        match="embed/enc: made by other weights or arguments than those of random:net now; run `mad embed enc` again",
    ):
        run(config)
    write_json(audit, told)
    bag = SlideTokens(config, config.biomarkers.aggregator("tuned")).read("S3")
    gone = config.model_copy(deep=True)
    pixels = TilePixels(gone, 0)
    pixels(bag, np.array([1]))
    pixels(bag, np.array([1]))
    assert capsys.readouterr().err.count("finetune.cache_gb") == 1
    pixels._rows["S3"] = type(pixels._rows["S3"])("S3", str(tmp_path / "no.tiff"), "P")
    with pytest.raises(MadError, match=r"no\.tiff"):
        pixels(bag)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder": "colour"}, r"biomarkers.aggregators: 'a': finetune cannot train 'colour' \(colour\)"),
        (
            {"encoder": "uni"},
            r"finetune cannot train 'uni' \(published:uni2-h\); it trains timm models of run:, random:",
        ),
        ({"encoder": "own"}, r"finetune cannot train 'own' \(python:m:f\)"),
        ({"encoder": "enc", "head": "mean"}, "finetune trains an encoder or a mixer with `head: attention`"),
        ({"mixer": "m", "head": "mean"}, "finetune trains an encoder or a mixer with `head: attention`"),
        ({"encoder": "enc", "finetune": {"layer_decay": 0}}, "layer_decay"),
    ],
)
def test_what_cannot_learn_is_refused_with_the_configuration(tmp_path: Path, change: dict, message: str):
    specs = {"enc": "random:net", "colour": "colour", "uni": "published:uni2-h", "own": "python:m:f"}
    value = {
        "runs": [tiny_run(name="net")],
        "encoders": [{"name": name, "spec": spec} for name, spec in specs.items()],
        "mixers": [{"name": "m", "encoder": "enc"}],
        "biomarkers": {
            "targets": [{"name": "t", "column": "c"}],
            "aggregators": [{"name": "a", "tokens": "finest", "finetune": {}} | change],
        },
    }
    with pytest.raises(MadError, match=message):
        parse_config(value)


def test_a_learning_row_is_no_baseline(made: Path):
    config = configure(made).model_dump()
    config["biomarkers"] |= {"baseline": None, "aggregators": [
        {"name": "tuned", "encoder": "enc", "tokens": "finest", "finetune": {}},
        {"name": "frozen", "encoder": "enc", "tokens": "finest"},
    ]}  # fmt: skip
    assert parse_config(config).biomarkers.compared_with == "frozen"
