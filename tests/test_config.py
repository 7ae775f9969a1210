"""The configuration: typos are named, the schema is generated, every shipped file is right."""

import json
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize(
    "path", [ROOT / "config.yaml", *sorted((ROOT / "configs").glob("*.yaml"))], ids=lambda p: p.name
)
def test_shipped_configurations_are_right(path: Path) -> None:
    base = yaml.safe_load((ROOT / "config.yaml").read_text())
    override = yaml.safe_load(path.read_text())
    config = parse_config({**base, **override})
    assert path.name == "config.yaml" or config.results != "results"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"tiel": {}}, "tiel: no such key, did you mean 'tile'"),
        ({"tile": {"tilepx": 224}}, "tile.tilepx: no such key, did you mean 'tile_px'"),
        ({"tile": {"magnifications": [10, 25]}}, "rise by integer factors"),
        ({"label": {"classes": ["A"], "background": None, "rename": {"x": "B"}}}, r"rename names \['B'\]"),
        ({"encoders": [{"name": "mad", "spec": "run:mda"}]}, "asks for run 'mda'"),
        ({"runs": [{"name": "a", "method": "dino"}]}, "runs.0.method: Input should be"),
        ({"cohort": {"split": {"train": 0.9, "val": 0.3, "test": 0.2}}}, "must be 1, not 1.4"),
    ],
)
def test_faults_name_their_key(value: dict[str, object], message: str) -> None:
    with pytest.raises(MadError, match=message):
        parse_config(value)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(MadError, match="no such configuration"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(MadError, match="this is list"):
        load_config(tmp_path / "list.yaml")
