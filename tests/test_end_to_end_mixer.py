"""The end-to-end part of stage biomarkers with a mixer: the files of any aggregator, at every share, resumable fold by fold."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_slides import DIM, fake_slides, slide_config
from safetensors.torch import load_file

from mad.config import Config, parse_config
from mad.files import MadError, read_json, read_parquet, write_json
from mad.models.mil import GatedAttention
from mad.models.mixer import load_mixer, save_mixer
from mad.stages import biomarkers, end_to_end, mix
from mad.stages.mix import contextual_tokens
from mad.stages.slide_tokens import SlideTokens, thinned
from mad.training.region_data import mean_and_std, read_regions

PATIENTS = 10
FINETUNE = {"lr": 1e-2, "warmup": 1, "max_tiles": 17, "pass_tiles": 100}


def configure(results: Path, **finetune: Any) -> Config:
    tuned = {"mixer": "mixer", "finetune": FINETUNE | finetune}
    rows = [
        {"name": "mma", "mixer": "mixer", "tokens": "all"},
        *({"name": f"tuned-{tokens}", "tokens": tokens, **tuned} for tokens in ("all", "finest", "coarsest", "region")),
    ]
    return slide_config(results, biomarkers={"aggregators": rows, "steps": 6, "check_every": 2, "batch": 4})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort with an untrained mixer's tokens: slides of 3 regions."""
    results = tmp_path_factory.mktemp("finetune_mixer")
    fake_slides(results, patients=PATIENTS)
    config = configure(results)
    entry, folder = config.mixer("mixer"), results / "mix" / "mixer"
    slides = [read_regions(config, entry, f"S{n:02d}") for n in range(PATIENTS)]
    mixer = mix.build_mixer(entry, mix.freeze_mixer(config, entry), DIM).eval()
    for own, found in zip((mixer.mean, mixer.std), mean_and_std(slides, 2), strict=True):
        own.copy_(found)
    sha256 = save_mixer(mixer, folder / mix.WEIGHTS, {})
    for slide in slides:
        mix.write_tokens(mixer, slide, folder)
    write_json(folder / "summary.json", {"status": "ok", "encoder": "enc", "weights_sha256": sha256})
    return results


def run(config: Config, name: str = "tuned-all", target: str = "fine") -> tuple[dict, Any, Any]:
    biomarkers.run(config, target, name)
    folder = Path(config.results) / "biomarkers" / target
    tables = [read_parquet(folder / part / f"{name}.parquet") for part in ("", "attention")]
    return read_json(folder / f"{name}.json"), *tables


@pytest.mark.parametrize(
    "name, kinds", [("all", {"10x", "40x"}), ("finest", {"40x"}), ("coarsest", {"10x"}), ("region", {"region"})]
)
def test_it_writes_what_every_aggregator_writes(made: Path, name: str, kinds: set[str]):
    config = configure(made)
    (one, frozen, _), (report, tuned, attention) = run(config, "mma"), run(config, f"tuned-{name}")
    assert set(report) == set(one) and set(report["by_share"]) == {"1", "0.5"}
    keys = ["slide_id", "share", "repeat", "fold", "truth", "tiles"]
    assert tuned[keys].equals(frozen[keys]) and tuned.columns.tolist() == frozen.columns.tolist()
    assert set(attention["kind"]) == kinds
    assert attention.groupby("slide_id")["attention"].sum().to_numpy() == pytest.approx(np.ones(PATIENTS), abs=1e-5)
    assert all(head["mixer_change"] > 0 and head["steps"] in (2, 4, 6) for head in report["heads"])
    assert report["rules"]["finetune_mixer"].startswith("the mixer learns") and "finetune_mixer" not in one["rules"]
    assert report["source"]["weights_sha256"] == read_json(made / "mix" / "mixer" / "summary.json")["weights_sha256"]


@pytest.mark.parametrize("target", ["fine", "level"])
def test_without_a_learning_rate_it_is_the_frozen_row(made: Path, target: str):
    config = configure(made, lr=0, max_tiles=None)
    (one, frozen, seen), (report, tuned, attention) = run(config, "mma", target), run(config, target=target)
    assert [head["steps"] for head in report["heads"]] == [head["steps"] for head in one["heads"]]
    assert {head["mixer_change"] for head in report["heads"]} == {0}
    for score in (name for name in frozen if name.startswith("score_")):  # at every share
        np.testing.assert_allclose(tuned[score], frozen[score], atol=1e-4)
    np.testing.assert_allclose(attention["attention"], seen["attention"], atol=1e-4)


def test_each_fold_mixes_anew_what_is_left_with_its_own_mixer(made: Path):
    """By hand from the fold's file: weights, thinned regions, tokens, standardisation, attention."""
    config = configure(made)
    table = run(config)[1]
    entry, folder = config.biomarkers.aggregator("tuned-all"), made / "biomarkers" / "fine" / "folds" / "tuned-all"
    reader, seen = SlideTokens(config, entry), []
    for line in table.itertuples():
        if line.slide_id not in ("S03", "S07"):
            continue
        tensors = load_file(folder / f"{line.repeat}-{line.fold}.safetensors")
        mixer = load_mixer(made / "mix" / "mixer" / mix.WEIGHTS)
        untuned = contextual_tokens(mixer, read_regions(config, config.mixer("mixer"), line.slide_id))
        mixer.load_state_dict({n.removeprefix("tokens.network."): t for n, t in tensors.items() if "network." in n})
        slide = read_regions(config, config.mixer("mixer"), line.slide_id)
        assert not np.allclose(contextual_tokens(mixer, slide), untuned, atol=0.01)
        slide = thinned(slide, reader._kept(slide.table, line.share))
        tiles = np.delete(contextual_tokens(mixer, slide), slide.bounds[:-1] + np.arange(len(slide)), axis=0)
        assert len(tiles) == line.tokens == (51 if line.share == 1 else 27)
        model = GatedAttention(16, 16, 2).eval()
        model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        scaled = (torch.from_numpy(tiles) - tensors["mean"][slide.scale]) / tensors["std"][slide.scale]
        seen.append(abs(float(model(scaled)[0].softmax(-1)[1].detach()) - line.score_1))
    assert len(seen) == 4 and max(seen) < 1e-5


def test_a_fold_is_kept_when_only_what_the_row_is_set_against_changes(made: Path, monkeypatch: pytest.MonkeyPatch):
    config = configure(made)
    whole = run(config)
    values = config.model_dump()
    values["biomarkers"]["aggregators"] = [
        row | {"against": "mma" if row["name"] == "tuned-all" else None} for row in values["biomarkers"]["aggregators"]
    ]
    monkeypatch.setattr(end_to_end, "fit_finetuned", None)  # nothing is trained
    again = run(parse_config(values))
    assert again[0] == whole[0] and again[1].equals(whole[1])


def test_an_interrupted_job_goes_on_with_its_fold(made: Path, monkeypatch: pytest.MonkeyPatch):
    config = configure(made, lr=2e-2)
    whole = run(config)
    shutil.rmtree(made / "biomarkers" / "fine" / "folds")
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


def test_other_settings_other_weights_and_other_embeddings_train_anew(made: Path, monkeypatch: pytest.MonkeyPatch):
    run(configure(made, lr=3e-2))
    real, done = end_to_end.fit_finetuned, []
    monkeypatch.setattr(end_to_end, "fit_finetuned", lambda *a, **named: done.append(1) or real(*a, **named))
    run(configure(made, lr=3e-2, checkpointing=False))
    assert len(done) == 0
    run(configure(made, lr=4e-2))
    assert len(done) == 5
    path = made / "embed" / "enc" / "dense" / "S03.json"
    told = read_json(path)
    write_json(path, {**told, "key": "another"})
    run(configure(made, lr=4e-2))
    write_json(path, told)
    assert len(done) == 10
    folder = made / "mix" / "mixer"
    summary, mixer = read_json(folder / "summary.json"), load_mixer(folder / mix.WEIGHTS)
    run(configure(made, lr=4e-2))
    assert len(done) == 15
    with torch.no_grad():
        mixer.decoder_norm.bias += 1
    sha256 = save_mixer(mixer, folder / mix.WEIGHTS, {})
    with pytest.raises(MadError, match=r"mix/mixer: made by other weights .* run `mad mix mixer` again"):
        run(configure(made, lr=4e-2))
    write_json(folder / "summary.json", {**summary, "weights_sha256": sha256})
    run(configure(made, lr=4e-2))
    assert len(done) == 20
    with torch.no_grad():
        mixer.decoder_norm.bias -= 1
    assert save_mixer(mixer, folder / mix.WEIGHTS, {}) == summary["weights_sha256"]
    write_json(folder / "summary.json", summary)


def test_tokens_of_other_tiles_are_refused(made: Path):
    """Also where there are as many of them: one tile became blank, another got tissue."""
    config = configure(made)
    table = read_parquet(made / "tile" / "S05.parquet")
    blank, last = table.index[table["status"] != "ok"], len(table) - 1
    assert len(blank) and table["status"][last] == "ok"
    for changes in ({last: "blank"}, {last: "blank", blank[0]: "ok"}):
        table.assign(
            status=table["status"].copy().where(~table.index.isin(list(changes)), table.index.map(changes))
        ).to_parquet(made / "tile" / "S05.parquet")
        with pytest.raises(MadError, match=r"S05.npy: not of the tiles there are now; run `mad mix mixer` again"):
            run(config)
    table.to_parquet(made / "tile" / "S05.parquet")


def test_embeddings_by_other_weights_than_those_that_were_mixed_are_refused(made: Path):
    path, config = made / "mix" / "mixer" / "summary.json", configure(made)
    summary = read_json(path)
    write_json(path, {**summary, "encoder_sha256": "of before"})
    for name in ("tuned-all", "mma"):  # at a share of the tiles a frozen mixer mixes anew as well
        with pytest.raises(
            MadError, match=r"other weights or arguments than those in embed/enc now; run `mad mix mixer` again"
        ):
            run(config, name)
    write_json(path, summary)
