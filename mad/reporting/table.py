"""A table of numbers and its CSV, Markdown and LaTeX: blocks of columns over the same rows, the best of a column in bold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table."""

    key: str
    """Of the cells, and the name in the CSV."""
    header: str
    digits: int = 4
    best: Literal["max", "min"] | None = None
    """Which of our rows is printed in bold."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number with its spread over runs and its interval over patients; null where it does not exist."""

    value: float | str | None
    std: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: an encoder, with a cell per column key, or the reason why it has none."""

    name: str
    cells: dict[str, Cell] = field(default_factory=dict)
    absent: str | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """A group of columns, printed under its own heading with the same rows."""

    title: str
    columns: list[Column]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A whole table."""

    name: str
    """File name without its suffix."""
    title: str
    blocks: list[Block]
    rows: list[Row]
    row_header: str = "Encoder"
    notes: list[str] = field(default_factory=list)
    published: list[Row] = field(default_factory=list)
    """Rows of the paper, in a part of their own."""
    published_note: str = ""

    def frame(self) -> pd.DataFrame:
        """Unrounded numbers: a line per row, `key`, `key std`, `key low`, `key high`, and `source` ("ours", "published")."""
        lines = []
        for source, rows in (("ours", self.rows), ("published", self.published)):
            for row in rows:
                line: dict[str, object] = {"source": source, self.row_header.lower(): row.name}
                for column in (column for block in self.blocks for column in block.columns):
                    cell = row.cells.get(column.key, Cell(value=None))
                    line[column.key] = cell.value
                    if cell.std is not None:
                        line[f"{column.key} std"] = cell.std
                    if cell.interval is not None:
                        line[f"{column.key} low"], line[f"{column.key} high"] = cell.interval
                line["absent"] = row.absent
                lines.append(line)
        keys = [column.key for block in self.blocks for column in block.columns]
        return (
            pd.DataFrame(lines) if lines else pd.DataFrame(columns=["source", self.row_header.lower(), *keys, "absent"])
        )

    def markdown(self) -> str:
        """Blocks as Markdown tables, the paper's rows apart, then the notes."""
        parts = [f"# {self.title}"]
        for block in self.blocks:
            parts += [f"## {block.title}", _grid(self.row_header, block, self.rows, bold=True)]
            printed = [row for row in self.published if any(column.key in row.cells for column in block.columns)]
            if printed:
                filled = [column for column in block.columns if any(column.key in row.cells for row in printed)]
                parts += [
                    f"*{self.published_note}:*",
                    _grid("Model", Block(title="", columns=filled), printed, bold=False),
                ]
        absent = [f"{row.name} is absent: {row.absent}." for row in self.rows if row.absent]
        parts.append("\n".join(f"- {note}" for note in self.notes + absent))
        return "\n\n".join(part for part in parts if part) + "\n"

    def latex(self) -> str:
        """One `tabular` per block, our rows alone."""
        parts = [f"% {self.title}"]
        for block in self.blocks:
            best = _best(block, self.rows)
            lines = [" & ".join([self.row_header, *(column.header for column in block.columns)])]
            for row in self.rows:
                texts = [(_text(row, c), (row.name, c.key) in best) for c in block.columns]
                lines.append(" & ".join([row.name, *(rf"\textbf{{{t}}}" if bold else t for t, bold in texts)]))
            body = " \\\\\n".join(_escape(line) for line in lines)
            spec = "l" + "r" * len(block.columns)
            parts.append(f"% {block.title}\n\\begin{{tabular}}{{{spec}}}\n{body} \\\\\n\\end{{tabular}}")
        return "\n\n".join(parts) + "\n"


def _grid(row_header: str, block: Block, rows: list[Row], *, bold: bool) -> str:
    best = _best(block, rows) if bold else set()
    lines = [[row_header, *(column.header for column in block.columns)]]
    lines.append(["---", *["---:"] * len(block.columns)])
    for row in rows:
        texts = [_text(row, column) for column in block.columns]
        marked = [f"**{t}**" if (row.name, c.key) in best else t for t, c in zip(texts, block.columns, strict=True)]
        lines.append([row.name, *marked])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _text(row: Row, column: Column) -> str:
    if row.absent:
        return "absent"
    cell = row.cells.get(column.key, Cell(value=None))
    if cell.value is None:
        return "–"
    if isinstance(cell.value, str):
        return cell.value
    value = round(cell.value, column.digits) + 0.0  # no "-0.000"
    text = f"{value:,.0f}" if column.digits == 0 else f"{value:.{column.digits}f}"
    if cell.std is not None:
        text += f" ± {cell.std:.{column.digits}f}"
    if cell.interval is not None:
        text += f" [{cell.interval[0]:.{column.digits}f}, {cell.interval[1]:.{column.digits}f}]"
    return text


def _best(block: Block, rows: list[Row]) -> set[tuple[str, str]]:
    """(row, column key) of the best printed number of each column; equal ones together, none where all are equal."""
    best = set()
    for column in block.columns:
        values = {
            row.name: round(value, column.digits)
            for row in rows
            if column.best and isinstance(value := row.cells.get(column.key, Cell(value=None)).value, int | float)
        }
        if len(set(values.values())) > 1:
            winner = max(values.values()) if column.best == "max" else min(values.values())
            best |= {(name, column.key) for name, value in values.items() if value == winner}
    return best


def _escape(line: str) -> str:
    for plain, tex in {
        "_": r"\_", "%": r"\%", "±": r"$\pm$", "→": r"$\rightarrow$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
        "Δ": r"$\Delta$", "–": "--",
    }.items():  # fmt: skip
        line = line.replace(plain, tex)
    return line
