"""The application that the commands register with, and the options that they share.

Imports of the stages happen inside the commands: `mad --help` and the workflow's many short jobs load no torch that they
do not need.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mad.config import Config
from mad.files import MadError

if TYPE_CHECKING:
    from mad.slides.sheet import SlideRow

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The command `mad`: one command per stage, and a few for looking.",
)
config_app = typer.Typer(no_args_is_help=True, help="The configuration: check it, print its keys or its schema.")
tiles_app = typer.Typer(no_args_is_help=True, help="Look at single tiles.")
shards_app = typer.Typer(no_args_is_help=True, help="Check the shards.")
app.add_typer(config_app, name="config")
app.add_typer(tiles_app, name="tiles")
app.add_typer(shards_app, name="shards")

ConfigFile = Annotated[Path, typer.Option("--config", "-c", envvar="MAD_CONFIG", help="Configuration file.")]
DEFAULT = Path("config.yaml")


def find_rows(config: Config, slide_ids: list[str] | None = None) -> list[SlideRow]:
    """The slides of the cohort with these ids; all of them where none are given.

    Raises:
        MadError: the cohort has no such slide.
    """
    from mad.slides.sheet import cohort_rows

    rows = {row.slide_id: row for row in cohort_rows(config)}
    for slide_id in slide_ids or []:
        if slide_id not in rows:
            near = difflib.get_close_matches(slide_id, rows, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(list(rows)[:20])}"
            raise MadError(f"the cohort has no slide {slide_id!r}; {known}")
    return [rows[slide_id] for slide_id in slide_ids or rows]
