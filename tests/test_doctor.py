"""`mad doctor`: a sound environment passes, each fault is told with its mend."""

import os
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from conftest import write_tiff
from huggingface_hub import constants
from typer.testing import CliRunner

from mad.cli import app
from mad.config import parse_config
from mad.reporting import check_slides, doctor
from mad.reporting.check import Check, guarded

HEADER = "slide_id\tpath\tpatient_id\tannotation\tsplit\n"


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    """A sheet of two slides with an annotation each, none of them there yet."""
    path = tmp_path / "slides.tsv"
    path.write_text(HEADER + "A\ta.tiff\tP1\ta.geojson\ttrain\nB\tb.tiff\tP2\tb.geojson\ttest\n")
    return path


def cohort(sheet: Path, **settings: str) -> Check:
    return doctor.check_cohort(parse_config({"cohort": {"sheet": str(sheet)}, **settings}))


def test_this_environment_is_sound(tmp_path: Path) -> None:
    """Where the tests run, python, OpenSlide, codecs, torch and the packages are right."""
    config = tmp_path / "config.yaml"
    config.write_text(f"results: {tmp_path / 'results'}\n")
    checks = {check.name: check for check in doctor.examine(config)}
    sound = ("python", "openslide", "readers", "codecs", "h5py", "torch", "torchvision", "timm")
    sound += ("config", "cohort", "token")
    assert {name: checks[name].status for name in sound} == dict.fromkeys(sound, "PASS")
    for name in ("packages", "snakemake", "gpu", "xformers"):
        assert checks[name].status != "FAIL"
    assert all(check.mend for check in checks.values() if check.status != "PASS")
    for name in ("JPEG", "deflate", "LZW", "JPEG 2000", "WebP", "zstd", "PNG"):
        assert name in checks["codecs"].finding
    for name in ("OpenSlide", "tifffile", "libvips"):
        assert name in checks["readers"].finding


def test_a_broken_codec_or_reader_is_told_and_the_others_are_still_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise RuntimeError("no such codec")

    monkeypatch.setattr(imagecodecs, "lzw_encode", broken)
    monkeypatch.setattr(imagecodecs, "zstd_decode", lambda data: bytes(32 * 32 * 3))
    found = check_slides.check_codecs()
    assert found.status == "FAIL" and found.mend
    assert "LZW: RuntimeError: no such codec" in found.finding and "zstd: pixels come back changed" in found.finding
    assert "JPEG" not in found.finding
    monkeypatch.setattr(tifffile, "imread", lambda path: np.zeros((32, 32, 3), np.uint8))
    found = check_slides.check_readers()
    assert found.status == "FAIL" and found.finding.startswith("tifffile: pixels") and "OpenSlide" not in found.finding


def test_slides_in_a_folder_that_may_not_be_entered_are_told(sheet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat

    def refuse(path: str, **options: object) -> os.stat_result:
        if str(path).endswith((".tiff", ".geojson")):
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refuse)
    found = cohort(sheet)
    assert found.status == "FAIL" and "0 of 2 slides" in found.finding and "a.tiff" in found.mend


def test_an_old_python_fails() -> None:
    assert doctor.check_python((3, 10, 12)).status == "FAIL"
    assert doctor.check_python((3, 11, 0)).status == "PASS"


def test_other_versions_than_those_tried_are_named(tmp_path: Path) -> None:
    """A comment, a package that is not installed and a local build tag make no difference; another version does."""
    numpy, torch = doctor._version("numpy"), doctor._version("torch")
    assert numpy and torch
    constraints = tmp_path / "constraints.txt"
    same = f"# tried with x==1\nnumpy=={numpy}\ntorch=={torch.split('+')[0]}\nno-such-package-mad==1.0\n"
    constraints.write_text(same)
    assert doctor.check_packages(constraints).status == "PASS"
    constraints.write_text(same.replace(numpy, "1.0.0"))
    found = doctor.check_packages(constraints)
    assert found.status == "WARN" and f"numpy {numpy} (tried with 1.0.0)" in found.finding and found.mend
    assert doctor.check_packages(tmp_path / "none.txt").status == "PASS"


def test_a_check_that_raises_has_failed() -> None:
    def broken() -> Check:
        raise OSError("libfoo.so.3: cannot open shared object file")

    found = guarded("foo", "install foo", broken)
    assert found == Check("foo", "FAIL", "OSError: libfoo.so.3: cannot open shared object file", "install foo")


@pytest.mark.parametrize("text", ["tile: {tile_pix: 112}\n", "tile: [\n", "- a list\n", None])
def test_a_broken_configuration_fails_and_the_environment_is_still_checked(tmp_path: Path, text: str | None) -> None:
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    run = CliRunner().invoke(app, ["doctor", "--config", str(config)])
    assert run.exit_code == 1
    assert "FAIL  config" in run.stdout and "PASS  codecs" in run.stdout and "mend: " in run.stdout
    if text == "tile: {tile_pix: 112}\n":
        assert "did you mean 'tile_px'" in run.stdout


def test_the_command_succeeds_with_warnings(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"results: {tmp_path}\nencoders: [{{name: uni, spec: 'hf-hub:MahmoodLab/UNI'}}]\n")
    run = CliRunner().invoke(app, ["doctor", "--config", str(config)], env={"HF_TOKEN": "x"})
    assert "PASS  token" in run.stdout
    assert run.exit_code == int("FAIL" in run.stdout)


def test_slides_that_are_not_there(sheet: Path) -> None:
    """None there: nothing can run. Some there: the others are quarantined, unless a bad slide is to stop the run."""
    found = cohort(sheet)
    assert found.status == "FAIL" and "0 of 2 slides and 0 of 2 annotations" in found.finding
    assert "a.tiff" in found.mend
    write_tiff(sheet.parent / "a.tiff", [np.zeros((300, 300, 3), np.uint8)], mpp=0.25)
    (sheet.parent / "a.geojson").write_text("{}")
    found = cohort(sheet)
    assert found.status == "WARN" and "1 of 2 slides and 1 of 2 annotations" in found.finding
    assert cohort(sheet, on_bad_slide="fail").status == "FAIL"
    (sheet.parent / "b.tiff").write_bytes((sheet.parent / "a.tiff").read_bytes())
    (sheet.parent / "b.geojson").write_text("{}")
    assert cohort(sheet).status == "PASS"


def test_a_sheet_with_faults_fails(tmp_path: Path) -> None:
    sheet = tmp_path / "slides.tsv"
    sheet.write_text(HEADER + "A.1\ta.tiff\tP1\t\ttrain\n")
    config = tmp_path / "config.yaml"
    config.write_text(f"cohort: {{sheet: {sheet}}}\nresults: {tmp_path}\n")
    found = {check.name: check for check in doctor.examine(config)}["cohort"]
    assert found.status == "FAIL" and "A.1" in found.finding and found.mend


def test_disk(tmp_path: Path) -> None:
    """Room is measured where the folder will be; thresholds warn, then fail."""
    results = tmp_path / "not" / "yet"
    assert doctor.check_disk(results, warn_gb=0, fail_gb=0).status == "PASS"
    assert doctor.check_disk(results, warn_gb=1e9, fail_gb=0).status == "WARN"
    assert doctor.check_disk(results, warn_gb=1e9, fail_gb=1e9).status == "FAIL"
    assert not results.exists()
    (tmp_path / "file").write_text("")
    assert doctor.check_disk(tmp_path / "file" / "results").status == "FAIL"


def test_a_token_is_asked_for_by_hub_encoders_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub = parse_config({"encoders": [{"name": "uni", "spec": "hf-hub:MahmoodLab/UNI"}]})
    assert doctor.check_token(parse_config({})).status == "PASS"
    found = doctor.check_token(hub)
    assert found.status == "WARN" and "uni" in found.finding and "HF_TOKEN" in found.mend
    (tmp_path / "token").write_text("x")
    assert doctor.check_token(hub).status == "PASS"
