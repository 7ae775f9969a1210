"""A table as a page of its own that sorts on a click, without anything from elsewhere: what the report shows."""

from __future__ import annotations

from typing import Any

from mad.reporting.table import Cell, Column, Row, Table, best_cells, cell_text, sources
from mad.reporting.web import render


def table_page(table: Table) -> str:
    """The page as HTML. A cell is printed as in Markdown; it is sorted by its number as the CSV has it, unrounded."""
    blocks = []
    for block in table.blocks:
        best = best_cells(block, table.rows)
        lines = [_line(row, block.columns, {key for name, key in best if name == row.name}) for row in table.rows]
        printed = [_line(row, block.columns, set()) for row in table.printed(block)]
        heads = [column.header for column in block.columns]
        blocks.append(
            {"title": block.title, "heads": heads, "lines": lines, "published": printed, "sources": sources(block)}
        )
    return render("table.html", table=table, blocks=blocks)


def _line(row: Row, columns: list[Column], best: set[str]) -> dict[str, Any]:
    """A row's name and its cells: text, the value that it is sorted by (null: last), whether it is a number, and the best."""
    cells = []
    for column in columns:
        value = row.cells.get(column.key, Cell(value=None)).value
        text = cell_text(row, column)
        cells.append({"text": text, "value": value, "best": column.key in best, "number": not isinstance(value, str)})
    return {"name": row.name, "cells": cells}
