"""README and docs/: links lead somewhere, commands parse, keys exist, quoted messages are the code's."""

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from snakemake.cli import get_argument_parser

from mad.cli import app
from mad.config import Config
from mad.config.base import section_in
from mad.config.regions import MixerConfig
from mad.config.training import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMK = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
RULES = set(re.findall(r"^ *rule (\w+):", SMK, re.M))
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.M | re.S)
INDENTED = re.compile(r"(?:(?<=\n\n)|^)(?: {4,}.*\n|\n(?= {4}))+", re.M)
NO_KEY = ("png", "json", "md", "yaml", "html", "parquet", "jsonl")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, where a repository's view and MkDocs make the same one."""
    headings = re.findall(r"^#{1,6} (.*)$", FENCE.sub("", page.read_text()), re.M)
    kept = [re.sub(r"[^\w\s-]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text)).strip().lower() for text in headings]
    plain = [re.sub(r"[-\s]+", "-", text.encode("ascii", "ignore").decode().strip()) for text in kept]
    return {
        one for one, text in zip(plain, kept, strict=True) if one == text.replace(" ", "-") and plain.count(one) == 1
    }


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of these languages; indented blocks count as ""."""
    text = page.read_text()
    found = [block for _, language, block in FENCE.findall(text) if language in languages]
    return found + (INDENTED.findall(FENCE.sub("", text)) if "" in languages else [])


def inline(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", page.read_text()))]


def commands(page: Path, *starts: str) -> list[list[str]]:
    """Words of every command line that begins so."""
    lines = "\n".join(blocks(page, "", "sh", "bash")).replace("\\\n", " ").splitlines()
    wanted = [re.split(r" [|>&] ", line)[0] for line in lines if re.match(rf"\s*({'|'.join(starts)}) ", line)]
    return [shlex.split(line, comments=True) for line in wanted]


def subcommand(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `mad WORDS` runs, and the words that it is given."""
    command: Any = typer.main.get_command(app)
    words = list(words)
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no command {words[:1]}; there are {sorted(command.commands)}"
        command = command.commands[words.pop(0)]
    return command, words


def check_keys(value: Any, section: Any, place: str) -> None:
    """Every key of a (partial) configuration is one of the model's."""
    if isinstance(value, list):
        for entry in value:
            check_keys(entry, section, place)
    elif isinstance(value, dict):
        for key, inner in value.items():
            assert key in section.model_fields, f"{place}{key}: no such key"
            if found := section_in(section.model_fields[key].annotation):
                check_keys(inner, found, f"{place}{key}.")


def has_key(parts: list[str], section: Any) -> bool:
    """Whether a dotted key is one of the section's."""
    for part in parts:
        if section is None or part not in section.model_fields:
            return False
        inner = section_in(section.model_fields[part].annotation)
        free = inner is None and str(section.model_fields[part].annotation).startswith("dict")
        if free:
            return True
        section = inner
    return True


@each_page
def test_links_lead_to_files_and_anchors(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), f"{link}: no such heading; there are {sorted(anchors(target))}"


@each_page
def test_commands_of_mad_parse(page: Path) -> None:
    for words in commands(page, "mad", "python -m mad"):
        command, rest = subcommand(words[words.index("mad") + 1 :])
        command.make_context(command.name, rest)
    for code in inline(page):
        if found := re.match(r"(?:python -m )?mad ([a-z].*)", code):
            command, rest = subcommand(found[1].replace("…", "").split())
            known = {name for option in command.params for name in option.opts} | {"--help"}
            assert {word for word in rest if word.startswith("-")} <= known, code


@each_page
def test_commands_of_snakemake_parse(page: Path) -> None:
    parser = get_argument_parser()
    quoted = [shlex.split(code) for code in inline(page) if code.startswith("snakemake -")]
    for words in commands(page, "snakemake") + quoted:
        try:
            given = parser.parse_args(words[1:])
        except SystemExit:
            pytest.fail(f"snakemake does not know {words}")
        assert all(target in RULES or target.startswith("results/") for target in given.targets), words
        for path in given.configfile or []:
            assert str(path) in ("my.yaml", "tutorial.yaml") or (ROOT / path).is_file(), words  # the reader's own
        assert (given.profile or ["slurm"]) == ["slurm"], words


@each_page
def test_keys_of_the_configuration_exist(page: Path) -> None:
    for block in blocks(page, "yaml"):
        check_keys(yaml.safe_load(block), Config, "")
    roots = (Config, RunConfig, MixerConfig)
    for code in inline(page):
        found = re.match(r"([a-z]\w*(?:\.[a-z]\w*)+)(?=$|[: ])", code)
        parts = found[1].split(".") if found else []
        if parts and parts[-1] not in NO_KEY and any(parts[0] in root.model_fields for root in roots):
            assert any(has_key(parts, root) for root in roots), f"{code}: no such key"
        if found := re.match(r"(\w+): [\[{]", code):
            owners = [root for root in roots if found[1] in root.model_fields]
            if owners and "…" not in code:
                check_keys(yaml.safe_load(code), owners[0], "")


def test_the_site_builds_and_its_links_hold(tmp_path: Path) -> None:
    """`make docs` into another folder: README is its first page, files outside docs/ are pages."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 'href="files/configs/own-slides.yaml.html"' in (tmp_path / "index.html").read_text()
    assert 'href="index.html#your-own-slides"' in (tmp_path / "tutorial.html").read_text()
    assert "split_by" in (tmp_path / "files" / "configs" / "own-slides.yaml.html").read_text()


def test_every_page_is_in_the_site_s_menu() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]} | {"index.md"}


def test_the_messages_of_troubleshooting_are_the_code_s() -> None:
    """`…` stands for what differs; other programs' messages are in the section "Snakemake"."""
    said = [(ROOT / "workflow/rules/common.smk").read_text()]
    for path in (ROOT / "mad").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    everything = "\n".join(said)
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    own, _, _ = text.partition("\n## It does not start\n")[2].partition("\n## Snakemake\n")
    quoted = [
        code
        for row in re.findall(r"^\| (.*?) \|", own, re.M)
        for code in re.findall(r"`([^`]+)`", row)
        if " " in code and not code.startswith("cohort.")
    ]
    assert len(quoted) > 50
    parts = [part.strip(" ,;") for code in quoted for part in code.split("…")]
    assert not [part for part in parts if part not in everything], "no message of mad holds these"
