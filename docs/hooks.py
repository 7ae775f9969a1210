"""MkDocs hook: README.md is the site's first page, and every file outside docs/ that a page links to is a page too.

In the repository such a link (`../configs/paper.yaml`) opens the file; on the site it opens a page with the file's text, so that
nothing depends on where the repository lies.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
LANGUAGES = {".yaml": "yaml", ".sbatch": "bash", ".py": "python", ".smk": "python"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md as index.md, and a page for each file that any page links to outside docs/."""
    files.append(File.generated(config, "index.md", content=_home((ROOT / "README.md").read_text(encoding="utf-8"))))
    for file in list(files.documentation_pages()):
        for link in LINK.findall(file.content_string):
            path = _outside(file.src_uri, link)
            if path and files.get_file_from_path(_page(path)) is None:
                text = (ROOT / path).read_text(encoding="utf-8")
                fenced = f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}````\n"
                files.append(File.generated(config, _page(path), content=fenced, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links that leave docs/ to the pages made above."""
    here = posixpath.dirname(page.file.src_uri)

    def mend(found: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, found[1])
        return posixpath.relpath(_page(path), here or ".") if path else found[1]

    return LINK.sub(mend, markdown)


def _home(readme: str) -> str:
    """README.md as it must read inside docs/: `docs/x.md` is `x.md`, everything else lies one folder up."""
    return LINK.sub(lambda found: posixpath.relpath(posixpath.normpath(found[1]), "docs"), readme)


def _outside(source: str, link: str) -> str | None:
    """The path from the root of the repository that a link of page `source` means, if it is a file outside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), link))
    return None if path.startswith(("docs/", "../")) or not (ROOT / path).is_file() else path


def _page(path: str) -> str:
    return "index.md" if path == "README.md" else f"files/{path}.md"
