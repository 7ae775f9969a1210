"""Pages that this package writes: jinja templates, style sheets and scripts, as they lie beside this file."""

from __future__ import annotations

from typing import Any

import jinja2


def render(name: str, **values: Any) -> str:
    """A template of this folder, filled in. Whatever is filled in is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__, "."), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name).render(**values)
