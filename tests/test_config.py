"""The configuration: typos are named, the schema is generated, every shipped file is right."""

import json
from pathlib import Path

import pytest
import yaml
from snakemake.utils import update_config

from mad.config import json_schema, load_config, parse_config
from mad.files import MadError, to_json

ROOT = Path(__file__).parents[1]


def test_the_schema_is_the_models() -> None:
    """Regenerate with `mad config schema > workflow/schemas/config.schema.json`."""
    text = (ROOT / "workflow/schemas/config.schema.json").read_text()
    assert text == to_json(json_schema())
    schema = json.loads(text)
    for name, part in [("Config", schema), *schema["$defs"].items()]:
        for key, value in part["properties"].items():
            assert "description" in value, f"{name}.{key} has no docstring"


ADDITIONS = {"mma-finetune.yaml": "mma.yaml"}  # to another configuration, given after it


@pytest.mark.parametrize(
    "path", [ROOT / "config.yaml", *sorted((ROOT / "configs").glob("*.yaml"))], ids=lambda p: p.name
)
def test_shipped_configurations_are_right(path: Path) -> None:
    """Over `config.yaml`, as Snakemake merges --configfile, and alone, as `mad config check` reads them."""
    names = ["config.yaml", *(f"configs/{name}" for name in [ADDITIONS.get(path.name)] if name), path.relative_to(ROOT)]
    merged: dict = {}
    for name in names:
        update_config(merged, yaml.safe_load((ROOT / name).read_text()))
    for config in (parse_config(merged), *([] if path.name in ADDITIONS else [load_config(path)])):
        assert path.name == "config.yaml" or config.results != "results"


def test_the_paper_s_configuration_has_the_counts_of_its_table_2() -> None:
    """Caps are Table 2's parents and standalone tiles times 50/61, the share of its training column."""
    config = load_config(ROOT / "configs" / "paper.yaml")
    pairs, alone = config.sample.max_pairs, config.sample.max_standalone
    for name, coarse, fine, standalone in [
        ("Gray Matter", 1263, 22460, 9434),
        ("White Matter", 1283, 18442, 7913),
        ("Leptomeninges", 1060, 12363, 5356),
        ("Superficial Cortex", 786, 8367, 3661),
        ("Background", 0, 0, 60149),
    ]:
        got = [0 if cap is None else cap.get(name, 0) for cap in (pairs["2.5x-10x"], pairs["10x-40x"])]
        assert got == [round(coarse * 50 / 61), round(fine * 50 / 61)]
        assert abs(sum(cap[name] for cap in alone.values()) - standalone * 50 / 61) <= 1
    table = {"2.5x-10x": 4392, "10x-40x": 61632, "standalone": 26364}  # Background is no part of the last
    for run in config.runs:
        assert {kind: round(count / 4392) for kind, count in table.items()} == run.mix
        assert run.init == "hf-hub:facebook/dinov2-with-registers-giant"  # with the token of masked patches
    assert config.tile.magnifications == [2.5, 10, 40] and config.tile.tile_px == 224


def run(mix: dict[str, float]) -> dict[str, object]:
    return {"name": "a", "method": "mad", "mix": mix}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"tiel": {}}, "tiel: no such key, did you mean 'tile'"),
        ({"tile": {"tilepx": 224}}, "tile.tilepx: no such key, did you mean 'tile_px'"),
        ({"tile": {"magnifications": [10, 25]}}, "rise by integer factors"),
        ({"label": {"classes": ["A"], "background": None, "rename": {"x": "B"}}}, r"rename names \['B'\]"),
        ({"encoders": [{"name": "mad", "spec": "run:mda"}]}, "asks for run 'mda'"),
        ({"runs": [{"name": "a", "method": "dino"}]}, "runs.0.method: Input should be"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**63}, "seed: Input should be less than 9223372036854775808"),
        ({"runs": [{"name": "a", "method": "mad", "seed": -1}]}, "runs.0.seed: Input should be greater"),
        ({"runs": [{"name": "a", "method": "mad", "seeds": [1, 2**63]}]}, "seed: Input should be less than"),
        ({"results": ""}, "results: is empty"),
        ({"results": "my results"}, r"results: holds \[' '\]"),
        ({"results": "a{b}"}, r"results: holds \['\{', '\}'\]"),
        ({"sample": {"max_unlabelled": -1}}, "sample.max_unlabelled: Input should be greater"),
        ({"cohort": {"split": {"train": 0.9, "val": 0.3, "test": 0.2}}}, "must be 1, not 1.4"),
    ],
)
def test_faults_name_their_key(value: dict[str, object], message: str) -> None:
    with pytest.raises(MadError, match=message):
        parse_config(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"sample": {"max_pairs": {"10x-40x": 5}}},
            r"sample.max_pairs names \['10x-40x'\]; the ladder \[5.0, 20.0\] has",
        ),
        ({"runs": [run({"10x-40x": 1})]}, r"`mix` of 'a' names \['10x-40x'\]; .* has \['5x-20x', 'standalone'\]"),
        ({"evaluate": {"transition": [10, 40]}}, r"evaluate.transition names '10x-40x'; .* has \['5x-20x'\]"),
        ({"evaluate": {"segmentation_magnifications": [5, 10]}}, r"segmentation_magnifications names \[10.0\]"),
    ],
)
def test_what_the_ladder_lacks_is_named(value: dict[str, object], message: str) -> None:
    with pytest.raises(MadError, match=message):
        parse_config({"tile": {"magnifications": [5, 20]}, **value})


def test_kinds_of_the_ladder_pass() -> None:
    mix = {"2.5x-10x": 1, "10x-40x": 1, "2.5x-10x-40x": 1, "standalone": 1, "5x-20x": 0}
    assert parse_config({"runs": [run(mix)]}).runs[0].mix == mix


@pytest.mark.parametrize(
    ("ladder", "transition"),
    [([2.5, 10, 40], (10, 40)), ([5, 20], (5, 20)), ([10, 20, 40], (20, 40)), ([10], (10, 40))],
)
def test_tables_follow_the_ladder_unless_they_are_told(ladder: list[float], transition: tuple[float, float]) -> None:
    tile = {"magnifications": ladder}
    config = parse_config({"tile": tile})
    assert config.evaluate.transition == transition
    assert config.evaluate.segmentation_magnifications == ladder[-2:]
    assert parse_config(config.model_dump(mode="json")) == config
    told = parse_config({"tile": tile, "evaluate": {"segmentation_magnifications": ladder[:1]}}).evaluate
    assert told.segmentation_magnifications == ladder[:1] and told.transition == transition


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(MadError, match="no such configuration"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(MadError, match="this is list"):
        load_config(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("top.yaml", "sample: {max_unlabelled: 1}\nseed: 0\n\nsample: {}\n", ("line 4: the key `sample`", "line 1")),
        ("nested.yaml", "runs:\n  - name: a\n    method: mad\n    name: b\n", ("line 4: the key `name`", "line 2")),
        ("merged.json", '{"seed": 1, "seed": 2}', ("line 1: the key `seed`", "line 1")),
    ],
)
def test_a_key_that_stands_there_twice_is_refused(tmp_path: Path, name: str, text: str, lines: tuple[str, str]) -> None:
    """YAML keeps the last one and says nothing."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(MadError, match=f"{path}: {lines[0]} stands in {lines[1]} already"):
        load_config(path)


def test_merge_keys_are_overridden_and_no_duplicates(tmp_path: Path) -> None:
    text = "synthetic: &s {patients: 5}\nencoders: [&a {name: a, spec: colour}, {<<: *a, name: b}]\n"
    (tmp_path / "config.yaml").write_text(text)
    assert [entry.name for entry in load_config(tmp_path / "config.yaml").encoders] == ["a", "b"]


def test_an_override_without_its_base_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "merged.json", "config.yaml"):
        (tmp_path / name).write_text("{seed: 3}" if name != "merged.json" else '{"seed": 3}')
    assert load_config("merged.json").seed == load_config("config.yaml").seed == load_config("mine.yaml").seed == 3
    assert not capsys.readouterr().err
    (tmp_path / "config.yaml").unlink()
    assert load_config("mine.yaml").seed == 3
    assert f"mine.yaml: no config.yaml in {tmp_path} to merge it over" in capsys.readouterr().err
