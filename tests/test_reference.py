"""docs/config.md: generated from the models, and complete."""

from pathlib import Path

from typer.testing import CliRunner

from mad.cli import app
from mad.config.reference import reference

PAGE = Path(__file__).parents[1] / "docs" / "config.md"


def test_the_page_is_the_models() -> None:
    """Regenerate with `mad config reference > docs/config.md`."""
    assert PAGE.read_text(encoding="utf-8") == reference()
    assert CliRunner().invoke(app, ["config", "reference"]).stdout == reference()


def test_a_key_has_its_type_default_and_meaning() -> None:
    lines = reference().splitlines()
    for line in (
        "| `seed` | whole number ≥ 0, < 2^63 | `0` | Seed of selection, training order and evaluation. |",
        '| `subsampling` | `"444"`, `"422"`, `"420"` | `"444"` | JPEG chroma subsampling. |',
        "| `sheet` | text or `null` | `null` | The cohort sheet `slides.tsv` ([data-contracts.md](data-contracts.md)). "
        "Not given: the synthetic cohort of `synthetic:`. |",
        "| `tissue` | section, [below](#tiletissue) |  | The tissue mask. |",
        "| `name` | text; letters, digits, `_`, `-`, at most 100 | required | Folder under `results/train/`. |",
    ):
        assert line in lines
    assert "### `runs.runtime`" in lines and lines.count("## `runs`") == 1
