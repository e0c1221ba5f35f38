"""The documentation's site builds strictly and without a network, and every link of its pages leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
REMOTE = {"https://unpkg.com/mathjax@3.2.2/es5/tex-mml-chtml.js"}
"""What a reader's browser fetches from elsewhere."""

BUILD = """
import socket, sys

def refused(self, address):
    raise AssertionError(f"the build asks {address}")

socket.socket.connect = socket.socket.connect_ex = refused
from mkdocs.__main__ import cli
cli()
"""


class Page(HTMLParser):
    """Ids of a page, links that readers follow, and files that it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("href"):
            self.loads.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", BUILD, "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert not built.stderr.strip(), built.stderr
    return folder


def is_remote(target: str) -> bool:
    return bool(re.match(r"[a-z]+:", target))


def test_every_link_and_anchor_exists(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 60
    lost = []
    for path, page in pages.items():
        for link in filter(lambda link: not is_remote(link), page.links):
            target, _, anchor = link.partition("#")
            there = (path.parent / unquote(target)).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            found = there.exists() and (not anchor or there.suffix != ".html" or unquote(anchor) in pages[there].ids)
            lost += [] if found else [f"{path.relative_to(site)}: {link}"]
    assert not lost


def test_pages_load_what_is_there(site):
    for path in site.rglob("*.html"):
        for name in Page(path).loads:
            if path.name == "404.html" and name.startswith("/"):
                name = "." + name
            assert name in REMOTE or (path.parent / name.partition("?")[0]).exists(), f"{path.name}: {name}"


def test_objects_are_described(site):
    text = (site / "reference.html").read_text()
    for words in ("Convert the model's batch norm layers to", "It may be a batch norm itself"):
        assert words in text
    assert "object:" not in text and ":::" not in text


def test_drawings_and_formulas_are_marked(site):
    assert '<pre class="mermaid">' in (site / "architecture.html").read_text()
    assert 'class="arithmatex"' in (site / "moving.html").read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_plain_markdown(path):
    """What a code host shows too; and a list after a paragraph needs a line between them, on the site."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"^(!!!|\?\?\?|===|:::)|\{[:.#]", re.sub(r"`[^`]*`|\$[^$]*\$", "", text), re.MULTILINE)
    before = ""
    for line in text.splitlines():
        if re.match(r"([*-]|\d+\.) ", line):
            assert not before or re.match(r"([*-]|\d+\.) |  ", before), f"a list needs an empty line before it: {line}"
        before = line


def test_every_page_has_its_place(site):
    """In the navigation, which is read from the start page."""
    listed = {link.partition("#")[0] for link in Page(site / "index.html").links}
    for path in sorted((ROOT / "docs").rglob("*.md")):
        assert path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() in listed | {"index.html"}, path
