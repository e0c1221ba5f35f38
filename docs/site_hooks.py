"""Pages as the site shows them: files beside docs/ become pages, and comments that name an object its documentation.

On a code host the same Markdown links to files, and the comments are not seen.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
BESIDE = "repository"
"""The folder of the site for what lies outside of docs/."""

LANGUAGES = {".py": "python", ".c": "c", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".sbatch": "bash"}
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")
OBJECT = re.compile(r"^.*\n(\[.*\))\n\n<!-- object: (\S+) -->$", re.MULTILINE)
"""A first sentence, the link to the source, and the comment that ``generate.py`` writes."""


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every file or folder outside of docs/ that a page links to."""
    for path in sorted({"README.md", "CHANGELOG.md", "CONTRIBUTING.md", *_linked()}):
        files.append(File.generated(config, _place(path), content=_page(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Lead links to the site's pages, and put whole docstrings in place of first sentences."""
    here = page.file.src_uri
    folder = os.path.dirname(os.path.join("docs", here) if not here.startswith(BESIDE) else here[len(BESIDE) + 1 :])

    def moved(link: re.Match[str]) -> str:
        there = _place(os.path.normpath(os.path.join(folder, link[1])))
        return f"]({os.path.relpath(there, os.path.dirname(here) or '.')}{link[2] or ''})"

    return LINK.sub(moved, OBJECT.sub(r"\1\n\n::: \2", markdown))


def _linked() -> Iterator[str]:
    """Paths outside of docs/ that pages link to, relative to the root."""
    for page in [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target, _ in LINK.findall(page.read_text()):
            path = os.path.relpath(page.parent / target, ROOT)
            if not path.startswith("docs"):
                yield path


def _place(path: str) -> str:
    """Where the site has what lies at ``path`` in the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{BESIDE}/{path}" if path.endswith(".md") else f"{BESIDE}/{path}.md"


def _page(path: Path) -> str:
    """A Markdown file as it is; of others the text, of folders that of every file."""
    if path.suffix == ".md":
        return path.read_text()
    files = [each for each in sorted(path.rglob("*")) if each.suffix in LANGUAGES] if path.is_dir() else [path]
    parts = [f"# {path.relative_to(ROOT)}"]
    for each in files:
        title = f"## {each.relative_to(ROOT)}\n\n" if path.is_dir() else ""
        parts.append(f"{title}~~~~{LANGUAGES[each.suffix]}\n{each.read_text()}~~~~")
    return "\n\n".join(parts) + "\n"
