"""Stage adapt and `spec: adapter:NAME`: what hides the alignment is undone by aligned pairs alone; files are as promised."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_results import fake_config, fake_results
from typer.testing import CliRunner

from mad.cli import app
from mad.config import Config, parse_config
from mad.evaluation.consistency import evaluate_consistency
from mad.evaluation.cross_scale import held_out_pairs, pair_figures, transfer_figures
from mad.files import MadError, digest, read_json, sha256_file, write_json
from mad.models.adapter import load_adapter
from mad.stages import adapt, embed, evaluate
from mad.stages.evaluate import load
from mad.tiles.embeddings import check_source, source_key
from mad.training.records import METRICS, read_metrics

QUICK = {"steps": 300, "warmup": 10, "prototypes": 64, "batch": 32, "lr": 2e-2, "keep": 1}
ADAPTERS = {
    "contrast": {"loss": "contrast"},
    "mad": {"loss": "mad"},
    "shuffled": {"loss": "contrast", "pairs": "shuffled"},
    "mad-shuffled": {"loss": "mad", "pairs": "shuffled"},
    "standardised": {"steps": 0, "warmup": 0},
}


def configure(results: Path, **adapters: dict[str, object]) -> Config:
    entries = [{"name": name, "encoder": "frozen", **QUICK, **settings} for name, settings in adapters.items()]
    encoders = [{"name": "frozen", "spec": "colour"}]
    encoders += [{"name": f"frozen-{name}", "spec": f"adapter:{name}"} for name in adapters]
    plain = fake_config(results, []).model_dump(mode="json")
    return parse_config({**plain, "encoders": encoders, "adapters": entries})


def hide(folder: Path) -> None:
    """Turn and shift the embeddings of each magnification by one rotation and offset of its own."""
    rng = np.random.default_rng(5)
    turns = [np.linalg.qr(rng.normal(size=(16, 16)))[0] for _ in range(3)]
    offsets = 5 * rng.normal(size=(3, 16))
    for path in folder.rglob("*.npy"):
        level = (
            pd.read_parquet(path.with_suffix(".parquet"))["tile_id"].str.extract(r"_L(\d)")[0].astype(int).to_numpy()
        )
        features = np.load(path)
        for number in range(3):
            own = level == number
            features[own] = features[own] @ turns[number] + offsets[number]
        np.save(path, features)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapt")
    fake_results(folder, {"frozen": 0.0}, patients=9)
    hide(folder / "embed" / "frozen")
    return folder


def retrieval(config: Config, encoder: str) -> float:
    """Children of test patients that find their parent within their slide."""
    report = evaluate_consistency(load(config, encoder), config.evaluate, seed=0)
    found: float = report["retrieval"]["child_to_parent"]["at_1"]
    return found


def test_aligned_pairs_undo_what_hides_the_alignment_and_shuffled_ones_do_not(results: Path) -> None:
    """On patients that no adapter has seen. Chance is one parent in about 60."""
    config = configure(results, **ADAPTERS)
    for name in ADAPTERS:
        adapt.run(config, name)
        embed.run(config, f"frozen-{name}")
    found = {name: retrieval(config, f"frozen-{name}") for name in ADAPTERS}
    assert retrieval(config, "frozen") < 0.1 and found["standardised"] < 0.1
    assert found["contrast"] > 0.5 and found["mad"] > 0.25, found
    assert max(found["shuffled"], found["mad-shuffled"]) < 0.15, found
    summary = read_json(results / "adapt" / "contrast" / "summary.json")
    before, after = (summary["validation"][key] for key in ("standardised", "adapted"))
    assert after["child_to_parent"] > 0.5 > 6 * before["child_to_parent"]
    assert after["knn_coarse_to_fine"] > before["knn_coarse_to_fine"] + 0.3  # the classes come along
    assert after["knn_fine"] > before["knn_fine"] - 0.02 and after["rankme_fine"] > 0.8 * before["rankme_fine"]
    assert summary["losses"]["align"] < summary["uniform"] < np.log(32.01)
    records = read_metrics(results / "adapt" / "contrast" / METRICS)
    assert len(records) == 300 and sum("health" in record for record in records) == 5
    assert records[-1]["health"]["child_to_parent"] == after["child_to_parent"]
    assert (results / "adapt" / "contrast" / "curves.png").stat().st_size > 10_000


def test_the_embeddings_are_the_base_s_through_the_head(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No slide is there to be opened; rows, dense ones too, are those of the base; what is up to date is left alone."""
    config = configure(results, linear={"steps": 3, "warmup": 1})
    adapt.run(config, "linear")
    embed.run(config, "frozen-linear")
    adapter = load_adapter(results / "adapt" / "linear")
    base, folder = (results / "embed" / name for name in ("frozen", "frozen-linear"))
    paths = sorted(path.relative_to(base) for path in base.rglob("*.npy"))
    assert any("dense" in path.parts for path in paths)
    assert paths == sorted(path.relative_to(folder) for path in folder.rglob("*.npy"))
    for path in paths:
        rows = pd.read_parquet((base / path).with_suffix(".parquet"))["tile_id"]
        assert pd.read_parquet((folder / path).with_suffix(".parquet"))["tile_id"].tolist() == rows.tolist()
        at = np.array([2.5, 10, 40])[rows.str.extract(r"_L(\d)")[0].astype(int)]
        vectors = np.load(folder / path)
        assert vectors.dtype == np.float32 and np.array_equal(vectors, adapter.apply_to(np.load(base / path), at))
    audit, summary = read_json(folder / "audit.json"), read_json(results / "adapt" / "linear" / "summary.json")
    assert audit["weights_sha256"] == summary["weights_sha256"] and audit["base"] == read_json(base / "audit.json")
    assert audit["spec"] == audit["config"]["spec"] == "adapter:linear" and audit["dim"] == 16
    stamps = {path: (folder / path).stat().st_mtime_ns for path in paths}
    embed.run(config, "frozen-linear")
    assert stamps == {path: (folder / path).stat().st_mtime_ns for path in paths}

    told = results / "adapt" / "linear" / "config.json"
    shape = read_json(told)
    write_json(told, {**shape, "unit": False})  # the same weights, used otherwise
    embed.run(config, "frozen-linear")
    lengths = np.linalg.norm(np.load(folder / paths[0]), axis=1)
    assert lengths.std() > 0.1
    write_json(told, shape)
    embed.run(config, "frozen-linear")
    assert np.allclose(np.linalg.norm(np.load(folder / paths[0]), axis=1), 4)
    evaluate.run(config, "frozen-linear")
    for protocol in ("classification", "clustering", "consistency", "transfer", "segmentation"):
        report = read_json(results / "evaluate" / "frozen-linear" / f"{protocol}.json")
        assert (report["status"], report["spec"]) == ("ok", "adapter:linear"), report["reason"]

    (folder / "audit.json").unlink()
    weights = results / "adapt" / "linear" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(MadError, match=r"not the head that summary.json tells of; run `mad adapt linear` again"):
        embed.run(config, "frozen-linear")
    weights.write_bytes(whole)
    first = read_json(base / "audit.json")
    write_json(base / "audit.json", {**first, "weights_sha256": "1" * 64})
    with pytest.raises(MadError, match=r"embedded by another encoder since; run `mad adapt linear` again"):
        embed.run(config, "frozen-linear")
    write_json(base / "audit.json", first)
    assert not (folder / "audit.json").exists()
    (results / "adapt" / "linear" / "summary.json").unlink()
    with pytest.raises(MadError, match=r"no finished adapter; run `mad adapt linear` first"):
        embed.run(config, "frozen-linear")


def test_the_command_gives_equal_bytes_each_time_and_vouches_for_nothing_meanwhile(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(results, twice={"steps": 5, "warmup": 1, "hidden": 8, "scales": "shared"})
    write_json(tmp_path / "config.json", config.model_dump(mode="json"))
    folder, files = (
        results / "adapt" / "twice",
        ("model.safetensors", "config.json", "recipe.json", METRICS, "curves.png"),
    )
    made = []
    for _ in range(2):
        run = CliRunner().invoke(app, ["adapt", "twice", "--config", str(tmp_path / "config.json")])
        assert run.exit_code == 0, run.exception
        made.append([(folder / name).read_bytes() for name in files])
    assert made[0] == made[1]
    summary = read_json(folder / "summary.json")
    assert summary["pairs"].keys() == {"2.5x-10x", "10x-40x"} and summary["status"] == "ok"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt, "train_adapter", stop)
    with pytest.raises(KeyboardInterrupt):
        adapt.run(config, "twice")
    assert not (folder / "summary.json").exists()
    assert [(folder / name).read_bytes() for name in files] == made[0]


def test_adapted_embeddings_are_traced_to_the_tiles_of_their_base(results: Path) -> None:
    config = configure(results, linear={"steps": 3, "warmup": 1})
    base, folder, shards = results / "embed" / "frozen", results / "embed" / "frozen-linear", results / "shard"
    slide, other = (path.stem for path in sorted(shards.glob("*.parquet"))[:2])
    key = source_key(read_json(base / "audit.json"), sha256_file(shards / f"{slide}.parquet"))
    write_json(base / f"{slide}.json", {"key": digest(key)})
    adapt.run(config, "linear")
    embed.run(config, "frozen-linear")
    check_source(folder, slide, shards / f"{slide}.parquet")
    with pytest.raises(MadError, match=rf"frozen.{slide}\.npy: embedded from other tiles .*run `mad embed frozen`"):
        check_source(folder, slide, shards / f"{other}.parquet")
    key = source_key(read_json(base / "audit.json"), sha256_file(shards / f"{other}.parquet"))
    write_json(base / f"{slide}.json", {"key": digest(key)})
    with pytest.raises(MadError, match=r"run `mad embed frozen-linear`"):
        check_source(folder, slide, shards / f"{other}.parquet")


def test_an_absent_encoder_makes_an_absent_adapter(tmp_path: Path) -> None:
    fake_results(tmp_path, {"frozen": 0.0}, patients=4, columns=2)
    write_json(tmp_path / "embed" / "frozen" / "audit.json", {"status": "absent", "reason": "gated", "config": {}})
    config = configure(tmp_path, linear={})
    adapt.run(config, "linear")
    embed.run(config, "frozen-linear")
    assert read_json(tmp_path / "adapt" / "linear" / "summary.json")["reason"] == "gated"
    audit = read_json(tmp_path / "embed" / "frozen-linear" / "audit.json")
    assert (audit["status"], audit["reason"], audit["config"]["spec"]) == ("absent", "gated", "adapter:linear")


def test_without_validation_patients_there_are_no_figures(tmp_path: Path) -> None:
    fake_results(tmp_path, {"frozen": 0.0}, patients=4, columns=3, splits={"S01": "train"}, labelled=False)
    adapt.run(configure(tmp_path, linear={"steps": 2, "warmup": 0}), "linear")
    summary = read_json(tmp_path / "adapt" / "linear" / "summary.json")
    assert summary["held_out"] == "there are no validation pairs" and summary["validation"]["adapted"] == {}


def test_the_figures_tell_found_from_hidden(results: Path) -> None:
    """Against an oracle that sees each tile's 10x neighbourhood, and a blind one."""
    data = load(configure(results, linear={}), "frozen")
    held = held_out_pairs(data, "val")
    assert held is not None and held.kind == "10x-40x"
    assert set(data.tiles["split"].iloc[held.parents]) == set(data.tiles["split"].iloc[held.children]) == {"val"}
    parts = data.tiles["tile_id"].str.split("_")
    place = pd.factorize(parts.str[0] + "_" + parts.str[2:5].str.join("_"))[0]
    codes = np.random.default_rng(0).normal(size=(place.max() + 1, 32)).astype(np.float32)
    seen = pair_figures(held, lambda rows: codes[place[rows]])
    assert seen["child_to_parent"] == seen["parent_to_child"] == 1 and seen["pair_cosine_gap"] > 0.9
    blind = pair_figures(held, lambda rows: np.ones((len(rows), 2), np.float32))
    assert blind["child_to_parent"] == pytest.approx(blind["child_to_parent_chance"])
    assert blind["child_to_parent_chance"] == pytest.approx(1 / len(held.parents))
    few = held_out_pairs(data, "val", most=7)
    assert few is not None and len(few.parents) == 7 and len(few.children) == 7 * 16
    assert (few.parents[few.parent_of] == data.pairs.set_index("child")["parent"].loc[few.children]).all()
    by_class = np.eye(len(data.classes), dtype=np.float32)[data.codes]
    assert transfer_figures(data, "10x-40x", "val", lambda rows: by_class[rows])["knn_coarse_to_fine"] == 1
    assert held_out_pairs(data, "none") is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"adapters": [{"name": "a", "encoder": "uni"}]}, r"'a' adapts 'uni'; encoders of images are \['e'\]"),
        ({"adapters": [{"name": "a", "encoder": "e"}] * 2}, "adapters: the name 'a' is used twice"),
        ({"encoders": [{"name": "x", "spec": "adapter:b"}]}, "'x' asks for 'adapter:b'"),
        (
            {
                "adapters": [{"name": "a", "encoder": "x"}],
                "encoders": [{"name": "e", "spec": "colour"}, {"name": "x", "spec": "adapter:a"}],
            },
            r"'a' adapts 'x'; encoders of images are \['e'\]",  # itself
        ),
        ({"adapters": [{"name": "a", "encoder": "e", "steps": 9, "warmup": 9}]}, "must be shorter than steps"),
        ({"adapters": [{"name": "a", "encoder": "e"}], "tile": {"magnifications": [10]}}, "nothing to adapt to"),
    ],
)
def test_faults_of_the_configuration_name_the_entry(value: dict[str, object], message: str) -> None:
    with pytest.raises(MadError, match=message):
        parse_config({"encoders": [{"name": "e", "spec": "colour"}], **value})
