"""Layout of the tables: blocks, bold, absent rows, the paper's rows apart; Table 2 counted by hand."""

from __future__ import annotations

import html
import io
import re
from dataclasses import replace

import pandas as pd
import pytest

from mad.reporting import published
from mad.reporting.composition import Composition, table2
from mad.reporting.from_json import BLOCK_NOTE, of_part
from mad.reporting.qc import health_table, time_table
from mad.reporting.table import Block, Cell, Column, Row, Table
from mad.reporting.tables import table3, table4, table5

CLASSES = ["Gray Matter", "White Matter", "Background"]


def small_table() -> Table:
    columns = [
        Column(key="up", header="Up", digits=2, best="max"),
        Column(key="down", header="Down", digits=1, best="min"),
    ]
    rows = [
        Row(name="a", cells={"up": Cell(value=0.504, std=0.01), "down": Cell(value=3.0)}),
        Row(name="b", cells={"up": Cell(value=0.501), "down": Cell(value=2.0, interval=(1.0, 2.5))}),
        Row(name="c", cells={"up": Cell(value=None), "down": Cell(value=-0.001)}),
        Row(name="e", cells={"up": Cell(value=0.4)}),
        Row(name="d", absent="not applicable: no labels"),
    ]
    paper = [Row(name="MAD-NP", cells={"up": Cell(value=0.99)})]
    return Table(
        name="t",
        title="T",
        blocks=[Block(title="B", columns=columns)],
        rows=rows,
        notes=["note"],
        published=paper,
        published_note="elsewhere",
    )


def test_markdown_marks_the_best_of_ours_alone() -> None:
    lines = small_table().markdown().splitlines()
    assert "| a | **0.50 ± 0.01** | 3.0 |" in lines  # equal as printed: both are bold
    assert "| b | **0.50** | 2.0 [1.0, 2.5] |" in lines
    assert "| c | – | **0.0** |" in lines
    assert "| d | n/a | n/a |" in lines
    assert "| MAD-NP | 0.99 |" in lines and "*elsewhere:*" in lines
    assert "- note" in lines and "- d: not applicable: no labels." in lines


def test_nothing_is_bold_where_all_are_equal() -> None:
    rows = [Row(name=name, cells={"up": Cell(value=1.0)}) for name in "ab"]
    block = Block(title="B", columns=[Column(key="up", header="Up", best="max")])
    assert "**" not in Table(name="t", title="T", blocks=[block], rows=rows).markdown()


def test_csv_holds_unrounded_numbers_and_their_spread() -> None:
    frame = pd.read_csv(io.StringIO(small_table().frame().to_csv(index=False))).set_index("encoder")
    assert frame.loc["a", ["up", "up std"]].tolist() == [0.504, 0.01]
    assert frame.loc["b", ["down low", "down high"]].tolist() == [1.0, 2.5]
    assert frame.loc["MAD-NP", "source"] == "published" and frame.loc["a", "source"] == "ours"
    assert frame.loc["d", "absent"] == "not applicable: no labels"


def test_latex_has_a_booktabs_table_per_block_and_no_raw_signs() -> None:
    table = small_table()
    odd = Row(name="50 %_{a} & $b$ [#1]", cells={"up": Cell(value=0.1)})
    text = replace(table, rows=[*table.rows, odd]).latex()
    assert text.count(r"\begin{tabular}{lrr}") == text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert r"\textbf{0.50 $\pm$ 0.01}" in text and r"2.0 {[}1.0, 2.5{]}" in text
    assert r"50 \%\_\{a\} \& \$b\$ {[}\#1{]} & 0.10" in text
    ours, paper = text.split(r"\multicolumn{3}{l}{\emph{elsewhere}}")
    assert "MAD-NP" not in ours and r"MAD-NP & 0.99 & -- \\" in paper
    assert text.count(r"\midrule") == 2
    for line in text.splitlines():  # as many cells in each line as the table has columns
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert line.replace(r"\&", "").count("&") == 2, line


ODD = [
    "A|B",
    "<b>x</b>",
    "50% *gray*",
    "`code`",
    "_in_ a_b",
    "[link](http://x)",
    r"Tumour \* stroma",
    "CD3+ <5%",
    "&lt;",
    '"q"',
]


def test_markdown_prints_names_letter_for_letter() -> None:
    """As CommonMark with tables and as Python-Markdown (MkDocs) show it: names are text, in cells, headings and notes."""
    commonmark, mkdocs = pytest.importorskip("markdown_it"), pytest.importorskip("markdown")
    columns = [Column(key=name, header=name) for name in ODD]
    rows = [Row(name=name, cells={ODD[0]: Cell(value=name)}) for name in ODD]
    notes = [f"{name}: not tested, see `split_by`." for name in ODD]
    table = Table(name="t", title=ODD[1], blocks=[Block(title=ODD[2], columns=columns)], rows=rows, notes=notes[:3])
    tokens = commonmark.MarkdownIt("commonmark").enable("table").parse(table.markdown())
    inline = [token for token in tokens if token.type == "inline"]
    kinds = {child.type for token in inline for child in token.children}
    assert kinds <= {"text", "text_special", "code_inline"}
    shown = ["".join(child.content for child in token.children) for token in inline]
    assert shown[:2] == [ODD[1], ODD[2]]
    cells = shown[2:-3]
    assert cells[: len(ODD) + 1] == ["Encoder", *ODD]
    assert cells[len(ODD) + 1 :: len(ODD) + 1] == cells[len(ODD) + 2 :: len(ODD) + 1] == ODD
    assert shown[-3:] == [note.replace("`", "") for note in notes[:3]]
    page = mkdocs.markdown(table.markdown(), extensions=["tables"])
    assert set(re.findall(r"<(\w+)", page)) == {
        "h1",
        "h2",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "ul",
        "li",
        "code",
    }
    assert [html.unescape(text) for text in re.findall(r"<t[hd][^>]*>(.*)</t[hd]>", page)] == cells


def test_ordinary_names_stay_readable_in_the_source() -> None:
    names = [
        "mad_global",
        "tri-s0",
        "S_pos ↑",
        "Δ_hier",
        "k-NN F1 (↑)",
        "0.50 ± 0.01 [1.0, 2.5]",
        "p < .05",
        "100 * a / b",
    ]
    rows = [Row(name=name, cells={"up": Cell(value=name)}) for name in names]
    block = Block(title="B", columns=[Column(key="up", header="Up")])
    lines = Table(name="t", title="T", blocks=[block], rows=rows).markdown().splitlines()
    assert {f"| {name} | {name} |" for name in names} <= set(lines)


def test_latex_has_its_notes_under_every_block_and_no_signs_that_its_first_font_lacks() -> None:
    table = small_table()
    names = [Row(name='<b> | "q" `c` >', cells={"up": Cell(value=0.1)})]
    text = replace(table, rows=[*table.rows, *names], blocks=table.blocks * 2, notes=["50 % <of> `a_b`"]).latex()
    assert r"\textless{}b\textgreater{} \textbar{} \texttt{\char34}q\texttt{\char34} \textasciigrave{}c" in text
    for block in text.split(r"\begin{table}")[1:]:
        under = block.split(r"\end{tabular}")[1]
        assert (
            r"\par 50 \% \textless{}of\textgreater{} a\_b" in under and r"\par d: not applicable: no labels." in under
        )
        assert under.count("{") == under.count("}") and r"\footnotesize" in under
    assert not set('<>|"`') & set(text)
    assert r"\parbox" not in replace(table, rows=table.rows[:1], notes=[]).latex()


def shard_rows() -> pd.DataFrame:
    lines = []
    for number, (label, split) in enumerate(
        [("Gray Matter", "train"), ("Gray Matter", "test"), ("White Matter", "train")]
    ):
        parent = f"p{number}"
        lines.append((parent, "10x-40x", "parent", parent, split, label))
        lines += [(f"{parent}c{k}", "10x-40x", "child", parent, split, label if k else "Background") for k in range(16)]
    lines += [(f"q{k}", "2.5x-10x", "child", "q", "train", "Gray Matter") for k in range(15)]
    lines += [
        ("p0", "2.5x-10x", "child", "q", "train", "Gray Matter"),
        ("q", "2.5x-10x", "parent", "q", "train", "Gray Matter"),
    ]
    lines += [
        ("b0", "40x", "standalone", "b0", "val", "Background"),
        ("g0", "10x", "standalone", "g0", "train", "Gray Matter"),
    ]
    frame = pd.DataFrame(lines, columns=["tile_id", "kind", "role", "sample_id", "split", "label"])
    return frame.assign(status="ok")


def counted(*slides: pd.DataFrame) -> Composition:
    found = Composition()
    for slide in slides:
        found.add(slide)
    return found


def test_table_2_counts_as_the_paper_and_as_tiles() -> None:
    table = table2(
        counted(shard_rows()), classes=CLASSES, background="Background", ladder=[2.5, 10, 40], split_by="patient"
    )
    rows = {row.name: {key: cell.value for key, cell in row.cells.items()} for row in table.rows}
    gray = rows["Gray Matter"]
    assert gray["2.5x-10x"] == "1 → 16" and gray["10x-40x"] == "2 → 32"
    assert gray["total"] == 48 and (gray["train"], gray["val"], gray["test"]) == (32, 0, 16)
    assert gray["standalone"] == 1
    assert (
        gray["unique"] == 2 * 16 - 2 + 2 + 15 + 1 + 1
    )  # children but two, both parents, the 2.5x parent's others, it, g0
    assert rows["White Matter"]["2.5x-10x"] is None and rows["White Matter"]["total"] == 16
    assert rows["Background"]["total"] == rows["Background"]["alone"] == rows["Background"]["val"] == 1
    assert rows["Background"]["standalone"] is None and rows["Grand Total"]["standalone"] == 1
    assert rows["Grand Total"]["total"] == 65
    assert rows["Grand Total"]["unique"] == shard_rows()["tile_id"].nunique()
    assert "Unlabelled" not in rows and BLOCK_NOTE not in table.notes


def test_table_2_adds_up_slides() -> None:
    options = {"classes": CLASSES, "background": "Background", "ladder": [2.5, 10, 40], "split_by": "patient"}
    both = [shard_rows().assign(**{key: shard_rows()[key] + n for key in ("tile_id", "sample_id")}) for n in "ab"]
    both[1].loc[::7, "label"] = None
    both[0].loc[::5, "status"] = "unreadable"
    whole = pd.concat([both[0], shard_rows().iloc[:0], both[1]])
    apart = counted(both[0], shard_rows().iloc[:0], both[1])
    assert apart == counted(whole) and apart.unreadable == (whole["status"] != "ok").sum() > 0
    assert table2(apart, **options).markdown() == table2(counted(whole), **options).markdown()


def test_table_2_is_printed_as_in_the_paper_and_ours_apart() -> None:
    """Columns, order and words of the paper's Table 2; what it does not print is a block of its own."""
    text = table2(
        counted(shard_rows()), classes=CLASSES, background="Background", ladder=[2.5, 10, 40], split_by="patient"
    ).markdown()
    lines = text.splitlines()
    start = lines.index("## As in the paper") + 2
    assert [line for line in lines[start : start + 6] if "---" not in line] == [
        "| Tissue Class | Spatially-Aligned Pairs 2.5x → 10x | Spatially-Aligned Pairs 10x → 40x "
        "| Standalone (2.5x, 10x, 40x) | Total Tiles | Data Split: Train | Data Split: Test |",
        "| Gray Matter | 1 → 16 | 2 → 32 | 1 | 48 | 32 | 16 |",
        "| White Matter | – | 1 → 16 | 0 | 16 | 16 | 0 |",
        "| Background | – | – | – | 1 | 0 | 0 |",
        "| Grand Total | – | – | 1 | 65 | 48 | 16 |",
    ]
    start = lines.index("## Beside it") + 2
    assert lines[start] == "| Tissue Class | Data Split: Val | All standalone | Unique tiles |"
    assert lines[start + 4] == "| Background | 1 | 1 | 4 |"


def test_table_2_shows_unlabelled_and_unreadable_tiles_and_the_block_note() -> None:
    tiles = shard_rows()
    tiles.loc[tiles["label"] == "White Matter", "label"] = None
    tiles.loc[tiles["tile_id"] == "g0", "status"] = "unreadable"
    table = table2(counted(tiles), classes=CLASSES, background="Background", ladder=[2.5, 10, 40], split_by="block")
    rows = {row.name: row.cells for row in table.rows}
    assert rows["Unlabelled"]["10x-40x"].value == "1 → 16" and rows["Gray Matter"]["standalone"].value == 0
    assert any("1 rows are unreadable" in note for note in table.notes) and BLOCK_NOTE in table.notes
    assert "Not patient-held-out" in table.markdown()


def test_empty_cohort_has_tables_too() -> None:
    empty = shard_rows().iloc[:0]
    assert (
        "Grand Total"
        in table2(counted(empty), classes=CLASSES, background=None, ladder=[10, 40], split_by="patient").markdown()
    )
    for table in (table3(["a"], {}, CLASSES), table4(["a"], {}), table5(["a"], {})):
        assert "a is absent: evaluate/a/" in table.markdown()
        assert table.title.startswith(f"Table {table.name[-1]}. ")


@pytest.mark.parametrize("protocol", ["consistency", "transfer"])
def test_not_applicable_is_the_reason_of_an_absent_row(protocol: str) -> None:
    reports = {"a": {protocol: {"status": "not applicable", "reason": "no 40x"}}}
    text = (table4 if protocol == "consistency" else table5)(["a"], reports).markdown()
    assert "a: not applicable: no 40x." in text


def test_a_part_of_a_protocol_may_lack_its_data_alone() -> None:
    whole = {"status": "ok", "matrix": {}, "table5": {"status": "ok"}}
    lacking = {"status": "ok", "paper": None, "table5": {"status": "not applicable", "reason": "no 40x"}}
    reports = {"a": {"transfer": lacking}, "b": {"transfer": whole}, "old": {"transfer": {"status": "ok"}}, "none": {}}
    found = of_part(reports, "transfer", "table5")
    assert found == reports | {"a": {"transfer": lacking["table5"]}}
    text = table5(["a"], {"a": reports["a"]}).markdown()
    assert "a: not applicable: no 40x." in text and text.count("n/a") > 10


def test_published_rows_are_whole() -> None:
    assert set(published.TABLE3) == set(published.TABLE4) == set(published.TABLE5)
    assert published.TABLE3["MAD-NP"]["linear White Matter"] == 0.9625
    assert published.TABLE3["Virchow2"]["knn Background"] == 0.9018 and published.TABLE3["UNI"]["ami"] == 0.2975
    for row in published.TABLE4.values():  # the paper's own columns, rounded in the last digit
        assert row["delta_hier"] == pytest.approx(row["s_pos"] - row["s_neg_same"], abs=0.0016)
        assert row["delta_sem"] == pytest.approx(row["s_neg_same"] - row["s_neg_diff"], abs=0.0016)


def test_health_tolerates_what_is_missing() -> None:
    summaries = {
        "mad": {
            "final_loss": 4.2,
            "ln_k": 4.8,
            "collapsed": True,
            "warnings": ["RankMe 1.2"],
            "stale": True,
            "health": {"rankme": 1.2},
        },
        "dino": {},
    }
    text = health_table(["mad", "dino", "later"], summaries).markdown()
    assert "| mad | – | yes | 4.200 | 4.800 | 0.875 | 1.200 |" in text and "| dino | – | – |" in text
    assert "mad is stale" in text and "dino is stale" not in text
    assert "mad: RankMe 1.2" in text and "later is absent: train/later/summary.json does not exist." in text
    assert health_table([], {}).frame().empty


def test_time_is_summed_by_stage() -> None:
    jobs = pd.DataFrame({"stage": ["tile", "tile", "train"], "s": [1.5, 2.5, 60], "max_rss": [100, 250, None]})
    text = time_table(jobs).markdown()
    assert "| tile | 2 | 4.0 | 2.5 | – | 250 |" in text and "| train | 1 | 60.0 | 60.0 | – | – |" in text
    assert "| Sum | 3 | 64.0 |" in text
    assert "No benchmark files." in time_table(jobs.iloc[:0]).markdown()
