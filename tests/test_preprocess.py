"""Stages cohort, tile, sample and shard on small synthetic slides, and on the real ones where there are some."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import write_tiff
from pipeline import configure, run_all

from mad.cli import tiles_show
from mad.config import parse_config
from mad.files import MadError, StorageError, read_json, write_json
from mad.slides.sheet import cohort_rows, write_sheet
from mad.stages import shard, tile
from mad.tiles.shards import decode, encode, read_member
from mad.tiles.verify import verify_slide


@pytest.fixture(scope="module")
def results(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(configure(tmp_path_factory.mktemp("run"), slides))


def test_tables_follow_their_contracts(results: Path) -> None:
    people = pd.read_parquet(results / "cohort" / "slides.parquet")
    assert people[["slide_id", "split", "split_by"]].to_numpy().tolist() == [
        ["S01", "train", "patient"],
        ["S02", "test", "patient"],
    ]
    assert "grade" not in people  # a target's: another label must not make everything anew
    tiles = pd.read_parquet(results / "tile" / "S01.parquet")
    assert tiles["magnification"].value_counts().to_dict() == {40: 256, 10: 16, 2.5: 1}
    assert set(tiles["status"]) <= {"ok", "blank"}
    assert {"Gray Matter", "White Matter", "Leptomeninges", "Superficial Cortex"} & set(tiles["label"].dropna())
    shares = tiles.filter(like="share_").drop(columns="label_share", errors="ignore")
    assert (shares.sum(axis=1) <= 1 + 1e-5).all()
    assert read_json(results / "tile" / "S01.json")["mpp"] == pytest.approx(0.25)
    assert (results / "tile" / "S01.png").stat().st_size > 1000
    cut = pd.read_parquet(results / "shard" / "S01.parquet")
    chosen = pd.read_parquet(results / "sample" / "S01.parquet")
    assert cut[["tile_id", "kind", "role", "sample_id", "position", "split"]].equals(
        chosen[["tile_id", "kind", "role", "sample_id", "position", "split"]]
    )
    assert (cut["status"] == "ok").all() and cut["sha256"].notna().all()
    assert read_json(results / "shard" / "cohort.json")["unreadable"] == 0


def test_parent_pixels_equal_the_area_average_of_their_children(results: Path) -> None:
    """Within the error of both JPEGs (slide and shard), at both transitions; one pixel of shift would show."""
    cut = pd.read_parquet(results / "shard" / "S01.parquet")
    for kind in ("2.5x-10x", "10x-40x"):
        pairs = cut[cut["kind"] == kind]
        for _, pair in list(pairs.groupby("sample_id"))[:6]:
            pixels = [
                decode(read_member(results / "shard", *place)) for place in pair[["shard", "offset", "size"]].to_numpy()
            ]
            parent, children = pixels[0].astype(float), np.stack(pixels[1:]).astype(float)
            mosaic = children.reshape(4, 4, 112, 112, 3).transpose(0, 2, 1, 3, 4).reshape(448, 448, 3)
            average = mosaic.reshape(112, 4, 112, 4, 3).mean(axis=(1, 3))
            error = np.abs(parent - average).mean()
            twice = average.round().astype(np.uint8)
            for quality in (90, 95):  # what the slide's and then the shard's JPEG do to just these pixels
                twice = decode(encode(twice, format="jpg", quality=quality, subsampling="444"))
            assert error <= np.abs(twice - average).mean() + 0.75
            if parent.std() > 10:
                assert all(np.abs(parent - np.roll(average, 1, axis)).mean() > error for axis in (0, 1))


def test_shards_hold_the_slides_own_pixels(results: Path, slides: Path) -> None:
    """A 40x child is the slide's own rectangle within the shard's JPEG error."""
    from mad.slides.readers import open_slide

    cut = pd.read_parquet(results / "shard" / "S01.parquet").merge(
        pd.read_parquet(results / "tile" / "S01.parquet", columns=["tile_id", "x", "y"]), on="tile_id"
    )
    with open_slide(slides / "S01.tiff") as slide:
        for row in cut[cut["magnification"] == 40].sample(20, random_state=0).itertuples():
            stored = decode(read_member(results / "shard", row.shard, row.offset, row.size, row.sha256))
            assert np.abs(stored.astype(int) - slide.read(0, row.x, row.y, 112, 112)).mean() < 3


def test_the_same_inputs_give_the_same_bytes(results: Path, slides: Path, tmp_path: Path) -> None:
    again = run_all(configure(tmp_path, slides))
    for path in sorted(results.rglob("*")):
        if path.is_file() and path.suffix in (".parquet", ".tar") and path.parent.name != "cohort":
            assert path.read_bytes() == (again / path.relative_to(results)).read_bytes(), path.name


def test_no_patient_and_no_child_crosses_the_split(results: Path) -> None:
    tables = pd.concat([pd.read_parquet(results / "shard" / f"{name}.parquet") for name in ("S01", "S02")])
    sides = tables.groupby("tile_id")["split"].nunique()
    assert (sides == 1).all()
    assert {"train", "test"} == set(tables["split"])


def test_a_bad_slide_is_quarantined_with_its_cause_or_stops_the_run(slides: Path, tmp_path: Path) -> None:
    shutil.copytree(slides, tmp_path / "slides")
    broken = tmp_path / "slides" / "S02.tiff"
    broken.write_bytes(broken.read_bytes()[:5000])
    config = configure(tmp_path, tmp_path / "slides")
    folder = run_all(config)
    facts = read_json(folder / "tile" / "S02.json")
    assert facts["status"] == "failed" and "S02.tiff" in facts["cause"] and "is the file whole" in facts["cause"]
    assert pd.read_parquet(folder / "tile" / "S02.parquet").empty
    assert pd.read_parquet(folder / "shard" / "S02.parquet").empty
    assert len(pd.read_parquet(folder / "shard" / "S01.parquet")) > 0
    with pytest.raises(MadError, match="is the file whole"):
        strict = config.model_copy(update={"on_bad_slide": "fail"})
        tile.run(strict, cohort_rows(strict)[1])


def test_an_undecodable_tile_takes_its_samples_out_and_is_listed(slides: Path, tmp_path: Path) -> None:
    import tifffile

    shutil.copytree(slides, tmp_path / "slides")
    path = tmp_path / "slides" / "S01.tiff"
    with tifffile.TiffFile(path) as file:
        offset, size = file.pages[0].dataoffsets[8], file.pages[0].databytecounts[8]  # tile row 1, column 1 of 7
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = bytes(size)
    path.write_bytes(data)
    folder = run_all(configure(tmp_path, tmp_path / "slides", sample={}))
    cut = pd.read_parquet(folder / "shard" / "S01.parquet")
    places = pd.read_parquet(folder / "tile" / "S01.parquet", columns=["tile_id", "x", "y", "side"])
    cut = cut.merge(places, on="tile_id")
    alone = cut[(cut["kind"] == "40x")]
    hit = (alone["x"] < 512) & (alone["x"] + 112 > 256) & (alone["y"] < 512) & (alone["y"] + 112 > 256)
    assert hit.any() and (alone.loc[hit, "status"] == "unreadable").all() and (alone.loc[~hit, "status"] == "ok").all()
    for _, pair in cut[cut["kind"] == "10x-40x"].groupby("sample_id"):
        assert set(pair["status"]) in ({"ok"}, {"unreadable", "incomplete"})
    bad = cut[cut["status"] == "unreadable"]
    assert read_json(folder / "shard" / "cohort.json")["unreadable"] == bad["tile_id"].nunique() < len(bad)
    assert (bad["size"] == 0).all() and bad["shard"].isna().all()
    assert (cut[cut["kind"] == "2.5x-10x"]["status"] == "ok").all()  # other levels are whole


def test_relabelling_rewrites_no_pixels(slides: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, slides, sample={})
    folder = run_all(config)
    before = {path: path.read_bytes() for path in (folder / "shard").rglob("*.tar")}
    renamed = {**config.model_dump(), "label": {"classes": ["GM", "Background"], "rename": {"Gray Matter": "GM"}}}
    run_all(parse_config({**renamed, "sample": {"background_pairs": True}}))
    after = {path: path.read_bytes() for path in (folder / "shard").rglob("*.tar")}
    name = Path(config.results) / "shard" / "S01" / "train-2.5x-10x-000000.tar"
    assert after[name] == before[name]
    assert "Gray Matter" not in b"".join(after.values()).decode("latin-1")


def test_unchanged_shards_are_not_cut_again(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table, deleted as the workflow deletes it, comes back without a pixel read; a change of any input cuts anew."""
    config = configure(tmp_path, slides)
    folder = run_all(config)
    row = cohort_rows(config)[0]
    table = folder / "shard" / "S01.parquet"
    before = table.read_bytes()
    cuts = []
    real = shard._cut
    monkeypatch.setattr(shard, "_cut", lambda *given: cuts.append(1) or real(*given))
    table.unlink()
    shard.run(config, row)
    assert table.read_bytes() == before and not cuts
    shard.run(config.model_copy(update={"shard": config.shard.model_copy(update={"quality": 80})}), row)
    assert len(cuts) == 1 and table.read_bytes() != before
    shard.run(config, row)
    assert len(cuts) == 2 and table.read_bytes() == before
    next((folder / "shard" / "S01").glob("*.tar")).unlink()
    shard.run(config, row)
    assert len(cuts) == 3
    tar = next((folder / "shard" / "S01").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-600])
    shard.run(config, row)
    assert len(cuts) == 4 and table.read_bytes() == before


def test_a_slide_repaired_without_a_trace_is_cut_again(slides: Path, tmp_path: Path) -> None:
    """A copy anew with its former time of change (`cp -p`, `rsync -t`) has the stamp of the damaged one."""
    shutil.copytree(slides, tmp_path / "slides")
    path = tmp_path / "slides" / "S01.tiff"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(bytes(20_000))
    shutil.copystat(slides / "S01.tiff", path)
    config = configure(tmp_path, tmp_path / "slides", sample={})
    table = run_all(config) / "shard" / "S01.parquet"
    assert (pd.read_parquet(table)["status"] == "unreadable").any()
    shutil.copy2(slides / "S01.tiff", path)
    shard.run(config, cohort_rows(config)[0])
    assert (pd.read_parquet(table)["status"] == "ok").all()


def test_a_tile_is_shown_or_refused(slides: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, slides)
    write_json(tmp_path / "config.json", config.model_dump(mode="json"))
    tiles_show("S01_L2_0_0_6_15", output=tmp_path / "new" / "tile.png", config=tmp_path / "config.json")
    from mad.slides.readers import open_slide

    with open_slide(slides / "S01.tiff") as slide:
        shown = cv2.cvtColor(cv2.imread(str(tmp_path / "new" / "tile.png")), cv2.COLOR_BGR2RGB)
        assert np.array_equal(shown, slide.read(0, (2 * 4 + 3) * 112, (1 * 4 + 3) * 112, 112, 112))
    for wrong in ("S01_L0_99_0", "S01_L1_0_0_16", "S01_L3_0_0_1_1_1", "S09_L0_0_0", "tile"):
        with pytest.raises(MadError, match=wrong.split("_")[0]):
            tiles_show(wrong, output=tmp_path / "x.png", config=tmp_path / "config.json")


def test_real_slides_give_aligned_tiles(real_slides: Path, tmp_path: Path) -> None:
    """The two 40x slides keep their pixel grid, the 20x one its micrometres; parents look like their shrunk children."""
    records = [
        {"slide_id": path.stem.split("_")[0], "path": str(path), "patient_id": path.stem, "annotation": ""}
        for path in sorted(real_slides.glob("*.svs"))
    ]
    for record in records:
        if (found := Path(record["path"]).with_suffix(".geojson")).exists():
            record["annotation"] = str(found)
    write_sheet(tmp_path / "slides.tsv", records)
    config = parse_config(
        {
            "results": str(tmp_path / "results"),
            "cohort": {"sheet": str(tmp_path / "slides.tsv"), "split_by": "block"},
            "label": {"classes": ["Crypts", "Infiltrate", "Compact", "Loose", "Background"]},
            "sample": {"max_pairs": {"2.5x-10x": 1, "10x-40x": 2}, "max_standalone": {"2.5x": 0, "10x": 0, "40x": 0}}
            | {"max_unlabelled": 0},
        }
    )
    folder = run_all(config)
    facts = {record["slide_id"]: read_json(folder / "tile" / f"{record['slide_id']}.json") for record in records}
    keeps = {name: fact["keeps_pixel_grid"] for name, fact in facts.items()}
    assert sorted(keeps.values()) == [False, True, True]
    small = next(fact for name, fact in facts.items() if not keeps[name])
    assert "40x left out" in small["cause"]
    checked = 0
    for name in (name for name, kept in keeps.items() if kept):
        cut = pd.read_parquet(folder / "shard" / f"{name}.parquet")
        for _, pair in cut[cut["kind"] == "10x-40x"].groupby("sample_id"):
            pixels = [
                decode(read_member(folder / "shard", *place)) for place in pair[["shard", "offset", "size"]].to_numpy()
            ]
            mosaic = np.stack(pixels[1:]).reshape(4, 4, 224, 224, 3).transpose(0, 2, 1, 3, 4).reshape(896, 896, 3)
            average = mosaic.reshape(224, 4, 224, 4, 3).mean(axis=(1, 3)).astype(np.float32)
            grey, wanted = average.mean(axis=2), pixels[0].astype(np.float32).mean(axis=2)
            centred = np.fft.fft2(grey - grey.mean()) * np.conj(np.fft.fft2(wanted - wanted.mean()))
            peak = np.unravel_index(np.fft.ifft2(centred).real.argmax(), grey.shape)
            shift = [min(p, 224 - p) for p in peak]
            assert max(shift) <= 1, (name, pair["sample_id"].iloc[0], peak)
            checked += 1
    assert checked >= 4


def test_a_slide_lost_after_tiling_is_quarantined_and_its_tars_wait_for_it(slides: Path, tmp_path: Path) -> None:
    shutil.copytree(slides, tmp_path / "slides")
    config = configure(tmp_path, tmp_path / "slides")
    folder = run_all(config)
    row, table = cohort_rows(config)[0], folder / "shard" / "S01.parquet"
    before = {path.name: path.read_bytes() for path in (folder / "shard" / "S01").iterdir()}
    whole = table.read_bytes()
    slide = Path(row.path)
    slide.rename(tmp_path / "elsewhere")
    table.unlink()
    shard.run(config, row)
    lost = pd.read_parquet(table)
    assert len(lost) and (lost["status"] == "unreadable").all() and (lost["size"] == 0).all()
    faults = [fault for _, found in verify_slide(folder / "shard", "S01") for fault in found]
    assert faults and all("put the slide back before the mend" in fault.cause for fault in faults)
    with pytest.raises(MadError, match="no such slide"):
        shard.run(config.model_copy(update={"on_bad_slide": "fail"}), row)
    (tmp_path / "elsewhere").rename(slide)
    shard.run(config, row)
    assert table.read_bytes() == whole
    assert {path.name: path.read_bytes() for path in (folder / "shard" / "S01").iterdir()} == before


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), MemoryError()])
def test_a_fault_of_the_machine_is_never_damage_of_a_slide(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """A disk that fails for a moment stops the job, and a rerun finds everything: no tile is written off."""
    config = configure(tmp_path, slides)
    folder = run_all(config)
    expected = (folder / "shard" / "S01.parquet").read_bytes()
    shutil.rmtree(folder / "shard")
    read, before = (
        os.pread,
        [3, 0],
    )  # reads that succeed before the fault: of shard, of tile, which reads the overview alone

    def failing(*given: int) -> bytes:
        before[0] -= 1
        if before[0] < 0:
            raise fault
        return read(*given)

    row = cohort_rows(config)[0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing)
        for stage in (shard, tile):
            with pytest.raises(MemoryError if isinstance(fault, MemoryError) else StorageError):
                stage.run(config, row)
            before.pop(0)
    assert not (folder / "shard" / "S01.parquet").exists()
    shard.run(config, row)
    assert (folder / "shard" / "S01.parquet").read_bytes() == expected


def test_ink_and_unscanned_black_are_no_glass(tmp_path: Path) -> None:
    """Where nobody annotated, glass is Background; ink over tissue and the scanner's black border are not."""
    pixels = np.full((1792, 1792, 3), 243, np.uint8)
    pixels[:, 600:] = np.random.default_rng(0).integers((150, 80, 140), (210, 130, 190), (1792, 1192, 3))
    pixels[1200:] = 0
    cv2.rectangle(pixels, (700, 100), (1700, 1000), (15, 120, 65), -1)
    write_tiff(tmp_path / "S.tiff", [pixels], mpp=0.25)
    (tmp_path / "S.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    record = {
        "slide_id": "S",
        "path": str(tmp_path / "S.tiff"),
        "patient_id": "P",
        "annotation": str(tmp_path / "S.geojson"),
    }
    write_sheet(tmp_path / "slides.tsv", [{**record, "split": "train"}])
    settings = {"results": str(tmp_path / "r"), "cohort": {"sheet": str(tmp_path / "slides.tsv")}}
    config = parse_config(settings | {"tile": {"tile_px": 112, "tissue": {"exclude_pen": True}}})
    tile.run(config, cohort_rows(config)[0])
    tiles = pd.read_parquet(tmp_path / "r" / "tile" / "S.parquet").query("magnification == 40")
    at = {name: tiles[(tiles["x"].between(*x)) & (tiles["y"].between(*y))] for name, (x, y) in {
        "glass": ((0, 400), (0, 1000)), "ink": ((800, 1400), (200, 800)), "black": ((0, 1600), (1300, 1600)),
    }.items()}  # fmt: skip
    assert all(len(part) for part in at.values())
    assert set(at["glass"]["label"]) == {"Background"}
    assert at["ink"]["label"].isna().all() and (at["ink"]["pen"] > 0.9).all() and set(at["ink"]["status"]) == {"blank"}
    assert at["black"]["label"].isna().all()
