"""The index of training tiles holds what tables of Python strings would, in a fraction of their memory."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from mad.training.index import COLUMNS, Pairs, load_index, load_indexes
from mad.training.tile_reader import TileReader

TRIPLE = "2.5x-10x-40x"


def plain_rows(folder, split):
    """The readable tiles of a split, in order, by pandas alone."""
    tables = [
        pd.read_parquet(path, columns=COLUMNS).assign(slide=path.stem) for path in sorted(folder.glob("*.parquet"))
    ]
    rows = pd.concat(tables, ignore_index=True).astype({"position": int})
    rows = rows[(rows["split"] == split) & (rows["status"] == "ok")]
    return rows.sort_values(["kind", "sample_id", "position"], kind="stable", ignore_index=True)


def plain_digest(rows):
    named = rows[["kind", "sample_id", "position", "tile_id", "sha256"]].itertuples(index=False)
    return hashlib.sha256("\n".join("\t".join(map(str, line)) for line in named).encode()).hexdigest()[:16]


def plain_pairs(rows, min_children):
    """Parents and children of each kind, coarse first, tile by tile."""
    found = {}
    paired = rows[rows["role"] != "standalone"]
    for kind in sorted(paired["kind"].unique(), key=lambda kind: float(kind.split("x-")[0])):
        own = paired[paired["kind"] == kind]
        families = {sample: (row, {}) for row, sample in own.loc[own["role"] == "parent", "sample_id"].items()}
        for row, sample, position in own.loc[own["role"] == "child", ["sample_id", "position"]].itertuples():
            if sample in families:
                families[sample][1][position] = row
        width = max((max(children, default=0) for _, children in families.values()), default=0) + 1
        kept = [family for family in families.values() if len(family[1]) >= min_children]
        table = [[children.get(n, -1) for n in range(width)] for _, children in kept]
        found[kind] = [parent for parent, _ in kept], np.array(table).reshape(-1, width).tolist()
    return found


def plain_triples(rows, pairs, min_children):
    ids, (coarse, fine) = rows["tile_id"].tolist(), (pairs["2.5x-10x"], pairs["10x-40x"])
    place = {ids[parent]: n for n, parent in enumerate(fine[0])}
    found = []
    for parent, children in zip(*coarse, strict=True):
        places = [place.get(ids[child], -1) if child >= 0 else -1 for child in children]
        if sum(n >= 0 for n in places) >= min_children:
            found.append((parent, [child if n >= 0 else -1 for child, n in zip(children, places, strict=True)], places))
    return [list(part) for part in zip(*found, strict=True)]


def members(slide, rng, splits):
    """Rows of a slide: pairs of two transitions, tiles alone; here and there one of another split, and one that is unreadable."""
    rows = []

    def add(tile, kind, role, sample, position, magnification):
        rows.append(
            {
                "tile_id": tile, "kind": kind, "role": role, "sample_id": sample, "position": position,
                "split": str(rng.choice(splits)), "magnification": magnification, "shard": f"{slide}/{kind}.tar",
                "offset": 2**40 + len(rows), "size": int(rng.integers(1, 2**20)), "sha256": rng.bytes(32).hex(),
                "status": str(rng.choice(["ok", "unreadable"], p=[0.9, 0.1])),
            }
        )  # fmt: skip

    for n in rng.permutation(12).tolist():
        for kind, level, coarse, fine in (("10x-40x", 1, 10.0, 40.0), ("2.5x-10x", 0, 2.5, 10.0)):
            parents = [f"{slide}_L1_{n}_{k}" for k in range(3)] if level else [f"{slide}_L0_{n}"]
            for parent in parents:
                add(parent, kind, "parent", parent, -1, coarse)
                for k in rng.permutation(16 if level else 4).tolist():
                    add(f"{parent.replace(f'_L{level}_', f'_L{level + 1}_')}_{k}", kind, "child", parent, k, fine)
        add(f"{slide}_L1_{n}_7", "10x", "standalone", f"{slide}_L1_{n}_7", -1, 10.0)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tables as pandas and Arrow may write them: shuffled, of several types, one empty, one all of another split."""
    folder, rng = tmp_path_factory.mktemp("shard"), np.random.default_rng(0)
    texts = ["tile_id", "kind", "role", "sample_id", "split", "shard", "sha256", "status"]
    slides = {
        "S10": (["train"], {}), "S1": (["train"], dict.fromkeys(texts, "string") | {"position": "int16"}),
        "S1-b": (["train", "train", "val"], dict.fromkeys(texts, "category") | {"position": "int8"}),
        "é Ω" * 30: (["val", "train"], dict.fromkeys(texts, object)), "V": (["val"], {}),
    }  # fmt: skip
    for slide, (splits, types) in slides.items():
        table = members(slide, rng, splits).sample(frac=1, random_state=1).astype(types)
        table.to_parquet(folder / f"{slide}.parquet", index=False)
    table.iloc[:0].to_parquet(folder / "empty.parquet", index=False)
    table.assign(status="unreadable", shard=None, sha256=None).to_parquet(folder / "lost.parquet", index=False)
    return folder


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_index_equals_one_of_plain_tables(folder, split):
    index, rows = load_indexes(folder, ["val", "test", "train"], 4)[split], plain_rows(folder, split)
    for name in [*COLUMNS, "slide"]:
        assert index.rows[name].astype(object).tolist() == rows[name].astype(object).tolist(), name
    assert list(index.rows) == list(rows)
    assert index.digest == plain_digest(rows) == load_index(folder, split, 4).digest
    digests = {slide: plain_digest(part) for slide, part in rows.groupby("slide")}
    assert list(index.slide_digests().items()) == list(digests.items())
    assert index.standalone.tolist() == np.flatnonzero(rows["role"] == "standalone").tolist()
    for min_children in (1, 4, 15):
        found = load_index(folder, split, min_children).pairs
        assert [(kind, own.parents.tolist(), own.children.tolist()) for kind, own in found.items()] == [
            (kind, *own) for kind, own in plain_pairs(rows, min_children).items()
        ]
    tiles = rows.drop_duplicates("tile_id")["magnification"].value_counts().sort_index()
    assert index.magnification_counts() == {f"{magnification:g}x": count for magnification, count in tiles.items()}
    triples = index.triples(TRIPLE, 2)
    if split == "test":
        assert triples is None and not index.counts() and len(rows) == 0
    else:
        found = [part.tolist() for part in (triples.parents, triples.children, triples.places)]
        assert found == plain_triples(rows, plain_pairs(rows, 4), 2) and len(found[0]) > 2


def test_lines_hashed_in_parts_give_the_digest_of_all(folder, monkeypatch):
    whole = load_index(folder, "train", 4)
    monkeypatch.setattr("mad.training.index.LINES", 7)
    parts = load_index(folder, "train", 4)
    assert (parts.digest, parts.slide_digests()) == (whole.digest, whole.slide_digests())


def test_a_row_takes_its_ids_its_digest_and_little_else(folder):
    """Of a reader's arrays none is of Python objects, which a loading process copies when it counts references to them."""
    index = load_index(folder, "train", 4)
    reader = TileReader(index, 32)
    rows, ids = index.rows, index.rows["tile_id"]
    texts = sum(rows[name].str.encode("utf-8").str.len().sum() + 8 for name in ("tile_id", "sample_id", "sha256"))
    assert rows.memory_usage(deep=True, index=False).sum() < texts + 64 * len(rows) + 10_000
    arrays = {name: value for name, value in vars(reader).items() if isinstance(value, np.ndarray)}
    assert len(arrays) >= 4 and not any(value.dtype.hasobject for value in arrays.values())
    assert [reader.tile_id(row) for row in range(len(rows))] == ids.tolist()


def test_a_kind_without_its_parents_has_no_pairs(tmp_path):
    table = members("S", np.random.default_rng(0), ["train"]).assign(status="ok")
    table[table["role"] != "parent"].to_parquet(tmp_path / "S.parquet", index=False)
    index = load_index(tmp_path, "train", 1)
    assert all(isinstance(own, Pairs) and own.children.shape == (0, 1) for own in index.pairs.values())
    assert list(index.pairs) == ["2.5x-10x", "10x-40x"] and index.triples(TRIPLE, 1).places.shape == (0, 1)
