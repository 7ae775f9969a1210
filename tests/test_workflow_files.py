"""What belongs to the workflow beside its rules: logs, benchmarks, captions, environments, profiles, quick parsing."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import heed_permissions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mad.slides.sheet import write_sheet

ROOT = Path(__file__).parents[1]
RULES = {
    match["name"]: match[0]
    for path in sorted((ROOT / "workflow" / "rules").glob("*.smk"))
    for match in re.finditer(
        r"^(?P<indent> *)rule (?P<name>\w+):\n(?:(?P=indent) +.*\n|\n)*", path.read_text(), re.MULTILINE
    )
}
WORKING = [name for name, text in RULES.items() if "shell:" in text]


def test_rules_are_found() -> None:
    assert {"tile_slide", "shard_cohort", "train_run", "report"} <= set(WORKING)
    assert "tile" in RULES and "tile" not in WORKING


@pytest.mark.parametrize("name", WORKING)
def test_a_rule_names_what_a_cluster_needs(name: str) -> None:
    text = RULES[name]
    keys = {"log:", "benchmark:", "conda:"} - ({"benchmark:"} if name == "tiled" else set())  # that one calls `date`
    for key in keys:
        assert key in text, key
    assert "{log} 2>&1" in text, "what a command says is in its log"
    if "localrule: True" not in text:
        assert "mem_mb=" in text and "runtime=" in text
    assert "retries:" not in text, "retries stand in the profile alone, or they multiply"


def test_the_documentation_tells_what_each_job_asks_for() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    table = text[text.index("## What a job asks for") : text.index("Memory and time double")]
    told = {
        name: (memory, time)
        for _, names, _, memory, time, *_ in (line.split("|") for line in table.splitlines() if "`" in line)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert set(told) == {name for name in WORKING if "localrule: True" not in RULES[name]}
    for name, (memory, time) in told.items():
        if (megabytes := re.search(r"mem_mb=more_each_try\((\d+)000\)", RULES[name])) is not None:
            assert memory.strip().startswith(f"{megabytes[1]} GB"), name
        minutes = re.search(r"runtime=(?:more_each_try\()?(\d+)", RULES[name])
        number, unit = time.split()
        assert minutes and int(minutes[1]) == int(number) * {"h": 60, "min": 1}[unit], name


def test_every_caption_is_there_and_used() -> None:
    named = {caption for text in RULES.values() for caption in re.findall(r"report/([\w{}]+)\.rst", text)}
    text = (ROOT / "workflow/rules/report.smk").read_text()
    for key, name in (("{table}", "TABLES"), ("{figure}", "FIGURES")):
        found = re.search(rf"^{name} = {{(.*?)^}}", text, re.MULTILINE | re.DOTALL)
        assert found and key in named
        later = re.findall(rf'^ +{name}\["(\w+)"\] =', text, re.MULTILINE)
        named = named - {key} | {*re.findall(r'^ +"(\w+)":', found[1], re.MULTILINE), *later}
    assert named == {path.stem for path in (ROOT / "workflow" / "report").glob("*.rst")}


def test_environments_hold_the_pinned_packages() -> None:
    """pyproject.toml says what is needed, constraints.txt which versions, each environment file both."""
    lines = (ROOT / "envs" / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    for text in project["dependencies"] + extras:
        wanted = Requirement(text)
        version = pins.get(canonicalize_name(wanted.name))
        assert version, f"{wanted.name} has no version in envs/constraints.txt"
        assert wanted.specifier.contains(version), f"{text}: envs/constraints.txt has {version}"
    expected = {
        (canonicalize_name(wanted.name), f"=={pins[canonicalize_name(wanted.name)]}", str(wanted.marker))
        for wanted in map(Requirement, project["dependencies"])
    }
    files = list((ROOT / "envs").glob("*.yaml"))
    assert files
    for path in files:
        packages = yaml.safe_load(path.read_text())["dependencies"][-1]["pip"]
        found = {(canonicalize_name(r.name), str(r.specifier), str(r.marker)) for r in map(Requirement, packages)}
        assert found == expected, path.name


def test_every_environment_is_used() -> None:
    named = {name for text in RULES.values() for name in re.findall(r'conda:\n\s+"../../envs/(\w+\.yaml)"', text)}
    assert named == {path.name for path in (ROOT / "envs").glob("*.yaml")}


def test_profiles_name_rules_that_exist() -> None:
    for path in (ROOT / "profiles").glob("*/profile.yaml"):
        profile = yaml.safe_load(path.read_text())
        for key in ("set-resources", "set-threads", "groups"):
            assert set(profile.get(key) or {}) <= set(RULES), f"{path}: {key}"
        assert set(profile.get("group-components", {})) <= set(profile.get("groups", {}).values())
    assert (ROOT / "slurm").resolve() == ROOT / "profiles" / "slurm"


def test_parsing_the_workflow_loads_nothing_heavy(tmp_path: Path) -> None:
    """Every job of a cluster parses the workflow again."""
    code = (
        "import sys\nfrom snakemake.cli import main\n"
        "try: main(['--dry-run', '--quiet', '--directory', sys.argv[1], '--snakefile', sys.argv[2]])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'timm', 'pyvips', 'cv2', 'sklearn', 'skimage', 'matplotlib', 'scipy'}\n"
        "assert 'mad.config' in sys.modules and not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    command = [sys.executable, "-c", code, str(tmp_path), str(ROOT / "Snakefile")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_folder_that_may_not_be_entered_ends_no_run(tmp_path: Path) -> None:
    """The jobs of its slides tell of it, and the slides elsewhere are tiled."""
    (tmp_path / "locked").mkdir()
    places = {"S1": "locked/S1.svs", "S2": "S2.svs"}
    for path in (*places.values(), "locked/a.geojson"):
        (tmp_path / path).touch()
    rows = [{"slide_id": name, "path": path, "patient_id": name} for name, path in places.items()]
    write_sheet(tmp_path / "slides.tsv", [{**row, "annotation": "locked/a.geojson"} for row in rows])
    cohort = {"sheet": str(tmp_path / "slides.tsv"), "split_by": "block"}
    settings = {"results": str(tmp_path / "results"), "cohort": cohort}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    command += ["--cores", "1", "--dry-run", "tile"]
    (tmp_path / "locked").chmod(0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=heed_permissions)
    finally:
        (tmp_path / "locked").chmod(0o755)
    told = done.stdout + done.stderr
    assert done.returncode == 0 and "wildcards: slide=S1" in told and "wildcards: slide=S2" in told, told


def test_an_encoder_on_a_disk_is_watched_with_its_configuration(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / name).touch()
    settings = {
        "results": str(tmp_path / "results"),
        "encoders": [{"name": "own", "spec": f"local-dir:{tmp_path}/own"}],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    command += ["--cores", "1", "--dry-run", str(tmp_path / "results" / "embed" / "own" / "audit.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    (inputs,) = re.findall(r"rule embed_encoder:\n +input: (.*)", done.stdout + done.stderr)
    assert {f"{tmp_path}/own/{name}" for name in ("config.json", "model.safetensors")} <= set(inputs.split(", "))


def dry_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    return subprocess.run([*command, "--cores", "1", "-n", *arguments], capture_output=True, text=True)


def test_a_key_that_stands_twice_in_any_file_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("synthetic: {patients: 4}\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("tile: {tile_px: 64}\nseed: 1\ntile: {min_tissue: 0.2}\n")
    done = dry_run(tmp_path, "--configfile", str(mine), str(tmp_path / "config.yaml"))
    told = done.stdout + done.stderr
    assert done.returncode and f"{mine}: line 3: the key `tile` stands in line 1 already" in told, told
    assert not (tmp_path / "results").exists()


def test_numbers_that_are_text_are_read_as_mad_reads_them(tmp_path: Path) -> None:
    """Of a nested key of --config, and of what YAML takes for text: 1e-4."""
    (tmp_path / "config.yaml").write_text('tile: {tile_px: "112"}\nevaluate: {probe_lr: 1e-4}\n')
    done = dry_run(tmp_path, "--config", "synthetic={patients: 4}", "--", "cohort")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (tmp_path / "results" / ".config").glob("*.json")
    settings = json.loads(found.read_text())
    assert settings["tile"]["tile_px"] == 112 and settings["evaluate"]["probe_lr"] == 1e-4
    assert settings["synthetic"]["patients"] == 4
