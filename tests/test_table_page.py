"""Tables as pages and the page of provenance: the numbers of the CSV and JSON, escaped, without anything from elsewhere."""

from __future__ import annotations

import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from test_tables import small_table

from mad.config import parse_config
from mad.files import write_json
from mad.reporting.provenance import provenance, provenance_page, revision
from mad.reporting.table import Block, Cell, Column, Row, Table, cell_text
from mad.reporting.table_page import table_page

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The rows of all table bodies: per cell its text and `data-v`; and every address that the page names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.bodies: list[list[list[tuple[str, str | None]]]] = []
        self.addresses: list[str] = []
        self.scripts = 0
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.addresses += [str(told[key]) for key in ("src", "href") if key in told]
        self.scripts += tag == "script"
        if tag == "tbody":
            self.bodies.append([])
        elif tag == "tr" and self.bodies:
            self.bodies[-1].append([])
        elif tag == "td":
            self.bodies[-1][-1].append(("", told.get("data-v")))
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "td"

    def handle_data(self, data: str) -> None:
        if self._inside:
            row = self.bodies[-1][-1]
            row[-1] = (row[-1][0] + data, row[-1][1])


def test_a_page_has_the_numbers_of_the_csv() -> None:
    table = small_table()
    page, frame = Page(table_page(table)), table.frame()
    ours = frame[frame["source"] == "ours"]
    assert [row[0][0] for row in page.bodies[0]] == list(ours["encoder"])
    for number, column in enumerate(table.blocks[0].columns, start=1):
        shown = [row[number] for row in page.bodies[0]]
        assert [float(value) if value else None for _, value in shown] == [
            None if pd.isna(value) else value for value in ours[column.key]
        ]
        assert [text for text, _ in shown] == [cell_text(row, column) for row in table.rows]
    published = [row for row in page.bodies[1] if row]
    assert published[0][0][0] == "MAD-NP" and published[0][1][1] == "0.99"


def test_a_page_needs_nothing_else_and_escapes_what_it_is_told() -> None:
    block = Block(title=EVIL, columns=[Column(key="x", header=EVIL), Column(key="y", header="y")])
    rows = [Row(name=EVIL, cells={"x": Cell(value=EVIL)}), Row(name="b", absent=EVIL)]
    text = table_page(Table(name="t", title=EVIL, blocks=[block], rows=rows, notes=[EVIL]))
    page = Page(text)
    assert EVIL not in text and page.scripts == 1
    assert page.bodies[0][0][1] == (EVIL, None) and page.bodies[0][1][1] == ("absent", "")
    assert page.addresses == ["data:,"]


def test_provenance_names_digests(tmp_path: Path) -> None:
    run = {"name": "made", "method": "mad"}
    encoders = [{"name": "colour", "spec": "colour"}, {"name": "made", "spec": "run:made"}]
    config = parse_config({"results": str(tmp_path), "runs": [run], "encoders": encoders})
    write_json(tmp_path / "shard" / "cohort.json", {"sha256": "5" * 64, "unreadable": 0, "tiles": {}})
    write_json(tmp_path / "train" / "made" / "summary.json", {"recipe_digest": "ab12", "weights_sha256": "7" * 64})
    write_json(tmp_path / "embed" / "colour" / "audit.json", {"spec": "colour"})
    found = provenance(config)
    assert found["shards"]["sha256"] == "5" * 64 and found["runs"]["made"]["recipe_digest"] == "ab12"
    assert found["encoders"]["made"] is None and found["encoders"]["colour"]["spec"] == "colour"
    assert {"torch", "snakemake", "timm"} <= set(found["packages"])
    assert found["config"]["encoders"][1]["spec"] == "run:made"
    text = provenance_page(found)
    cells = {cell for body in Page(text).bodies for row in body for cell, _ in row}
    assert {"5" * 64, "7" * 64, "ab12", found["revision"], found["packages"]["torch"], "not made yet"} <= cells
    assert provenance(config) == found, "no time of day"


def test_revision(tmp_path: Path) -> None:
    assert revision(tmp_path) == "not a checkout"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("init")
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no git here")
    assert revision(tmp_path) == "not a checkout", "a checkout without a commit"
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    assert revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert revision(tmp_path) == git("rev-parse", "HEAD") + ", with changes"
    (tmp_path / "inside").mkdir()
    assert revision(tmp_path / "inside") == "not a checkout"
