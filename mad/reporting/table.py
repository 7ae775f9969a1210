"""A table of numbers and its CSV, Markdown and LaTeX: blocks of columns over the same rows, the best of a column in bold."""

from __future__ import annotations

import re
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
    source: tuple[str, ...] = ()
    """Where its numbers stand: a protocol's JSON and the keys in it, as ("transfer", "paper", "agreement")."""
    interval: tuple[str, ...] = ()
    """Keys of its intervals in the same JSON."""
    scale: float = 1
    """What the numbers of the JSON are multiplied by."""


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

    @property
    def is_empty(self) -> bool:
        """Whether the encoder is there and the protocol had nothing to work on."""
        return bool(self.absent and self.absent.startswith("not applicable"))


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
        parts = [f"# {_plain(self.title)}"]
        for block in self.blocks:
            parts += [f"## {_plain(block.title)}", _grid(self.row_header, block, self.rows, bold=True)]
            if printed := self.printed(block):
                filled = [column for column in block.columns if any(column.key in row.cells for row in printed)]
                parts += [
                    f"*{self.published_note}:*",
                    _grid("Model", Block(title="", columns=filled), printed, bold=False),
                ]
            parts.append(sources(block))
        parts.append("\n".join(f"- {_plain(note, code=True)}" for note in self.remarks))
        return "\n\n".join(part for part in parts if part) + "\n"

    def latex(self) -> str:
        r"""One booktabs `table` per block (`\usepackage{booktabs}`): our rows, best in bold, the paper's apart, the notes."""
        parts = [f"% {self.title}"]
        notes = [rf"\par {_escape(note.replace('`', ''))}" for note in self.remarks]
        under = ["", r"\medskip", r"\parbox{\linewidth}{\raggedright\footnotesize", *notes, "}"] if notes else []
        for number, block in enumerate(self.blocks):
            best = best_cells(block, self.rows)
            width = len(block.columns) + 1
            ours = [_tex_line(row, block.columns, {key for name, key in best if name == row.name}) for row in self.rows]
            lines = [r"\toprule", _tex_cells([self.row_header, *(c.header for c in block.columns)]), r"\midrule", *ours]
            if printed := self.printed(block):
                marked = rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_escape(self.published_note)}}}}} \\"
                lines += [r"\midrule", marked, *(_tex_line(row, block.columns, set()) for row in printed)]
            lines.append(r"\bottomrule")
            parts.append(
                "\n".join(
                    [
                        r"\begin{table}",
                        r"\centering",
                        rf"\caption{{{_escape(f'{self.title}: {block.title}')}}}",
                        rf"\label{{tab:{self.name}-{number + 1}}}",
                        rf"\begin{{tabular}}{{l{'r' * len(block.columns)}}}",
                        *lines,
                        r"\end{tabular}",
                        *under,
                        r"\end{table}",
                    ]
                )
            )
        return "\n\n".join(parts) + "\n"

    @property
    def remarks(self) -> list[str]:
        """The notes, then why rows have no numbers."""
        absent = [f"{row.name}{'' if row.is_empty else ' is absent'}: {row.absent}." for row in self.rows if row.absent]
        return self.notes + absent

    def printed(self, block: Block) -> list[Row]:
        """The paper's rows that have a number in a block."""
        return [row for row in self.published if any(column.key in row.cells for column in block.columns)]


def _grid(row_header: str, block: Block, rows: list[Row], *, bold: bool) -> str:
    best = best_cells(block, rows) if bold else set()
    lines = [[_plain(text) for text in (row_header, *(column.header for column in block.columns))]]
    lines.append(["---", *["---:"] * len(block.columns)])
    for row in rows:
        texts = [_plain(cell_text(row, column)) for column in block.columns]
        marked = [f"**{t}**" if (row.name, c.key) in best else t for t, c in zip(texts, block.columns, strict=True)]
        lines.append([_plain(row.name), *marked])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


MARKUP = re.compile(
    r"\\(?=[^\w\s])|[`|]|\*(?=\S)|(?<=\S)\*|<(?=[a-z/!?])|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|(?<=\])\(", re.IGNORECASE
)
"""What Markdown would not print as it stands; an underscore inside a word, an asterisk between blanks it prints."""


def _plain(text: str, *, code: bool = False) -> str:
    """A text that Markdown prints letter for letter, but for its `code` where it may have some."""
    parts = re.split(r"(`[^`]+`)", text) if code else [text]
    return "".join(part if number % 2 else MARKUP.sub(_escaped, part) for number, part in enumerate(parts))


def _escaped(found: re.Match[str]) -> str:
    return {"<": "&lt;", "&": "&amp;"}.get(found[0], f"\\{found[0]}")


def cell_text(row: Row, column: Column) -> str:
    """What is printed of a cell: the rounded number with its spread and interval, or why there is none."""
    if row.absent:
        return "n/a" if row.is_empty else "absent"
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


def best_cells(block: Block, rows: list[Row]) -> set[tuple[str, str]]:
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


def sources(block: Block) -> str:
    """The places of a block's numbers, by the JSON that they stand in."""
    found: dict[str, list[str]] = {}
    for column in block.columns:
        if column.source:
            found.setdefault(column.source[0], []).append("/".join(column.source[1:]))
    texts = [f"`{protocol}.json`: {', '.join(f'`{path}`' for path in paths)}" for protocol, paths in found.items()]
    return f"Numbers: {'; '.join(texts)}." if texts else ""


def _tex_line(row: Row, columns: list[Column], best: set[str]) -> str:
    texts = [_escape(cell_text(row, column)) for column in columns]
    marked = [rf"\textbf{{{text}}}" if c.key in best else text for text, c in zip(texts, columns, strict=True)]
    return " & ".join([_escape(row.name), *marked]) + r" \\"


def _tex_cells(texts: list[str]) -> str:
    return " & ".join(_escape(text) for text in texts) + r" \\"


TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "→": r"$\rightarrow$", "↑": r"$\uparrow$",
        "↓": r"$\downarrow$", "Δ": r"$\Delta$", "×": r"$\times$", "–": "--", "…": r"\ldots{}", "[": "{[}", "]": "{]}",
        "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}", '"': r"\texttt{\char34}",
    }
)  # fmt: skip


def _escape(text: str) -> str:
    return text.translate(TEX)
