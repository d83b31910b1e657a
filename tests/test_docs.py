"""The documentation: links lead somewhere, what pages name exists, every page can be reached.

The tutorial's Python gives shards that the loader reads. Building the site is `make docs`."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from unclip_pl.cli.configs import find_config
from unclip_pl.cli.unclip import bind
from unclip_pl.data.names import expand

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ROOMS = ("unclip_pl", "eval", "stages", "lightning_config", "benchmarks", "tests", "docs")
PATH = re.compile(rf"`((?:{'|'.join(ROOMS)})/[\w./-]*(?:\.\w+|/))`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def dead_links(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere; those to other sites are left alone."""
    dead = []
    for link in LINK.findall(prose(text)):
        name, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / name) if name else page
        known = target.is_file()
        if known and anchor:
            known = anchor in anchors(target.read_text(encoding="utf-8"))
        if not known:
            dead.append(link)
    return dead


def commands(text: str, name: str) -> list[list[str]]:
    """The words of every command line of this name in a page's fenced blocks."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(f"{name} "):
                found.append(shlex.split(line, comments=True))
    return found


def toctree(text: str) -> list[str]:
    """The pages that a page's toctrees name."""
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.S | re.M)
    lines = [line.strip() for tree in trees for line in tree.splitlines()]
    entries = [line for line in lines if line and not line.startswith(":")]
    return [re.sub(r".*<(\S+)>$", r"\1", entry) for entry in entries]


@by_page
def test_links_lead_somewhere(page):
    assert not dead_links(page, page.read_text(encoding="utf-8"))


def test_dead_links_are_found():
    text = "[a](index.md) [b](gone.md) ![c](gone.png) [d](index.md#gone) [e](https://x.org)"
    assert dead_links(PAGES[0], text) == ["gone.md", "gone.png", "index.md#gone"]


@by_page
def test_named_files_exist(page):
    named = PATH.findall(page.read_text(encoding="utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_page_can_be_reached():
    listed = toctree((DOCS / "index.md").read_text(encoding="utf-8"))
    assert sorted([*listed, "index"]) == [page.stem for page in PAGES]


@by_page
def test_unclip_commands_parse(page):
    for words in commands(page.read_text(encoding="utf-8"), "unclip"):
        assert bind(words[1:]), words


@by_page
def test_configurations_exist(page):
    own = set(re.findall(r"^`([\w.-]+\.yaml)`:?$", page.read_text(encoding="utf-8"), re.M))
    for words in commands(page.read_text(encoding="utf-8"), "lightning"):
        files = [words[i + 1] for i, word in enumerate(words) if word == "-c"]
        # A run writes its own.
        files = [file for file in files if not re.fullmatch(r"runs/\w+/config\.yaml", file)]
        assert all(file in own or Path(find_config(str(ROOT / file))).is_file() for file in files)


def test_architecture_names_what_its_files_hold():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", text)
    missing = [
        (path, name)
        for path, name in named
        for part in name.split(".")
        if not re.search(rf"(?:def|class) {part}\b", (ROOT / path).read_text(encoding="utf-8"))
    ]
    assert len(named) > 20 and not missing


def test_glossary_names_are_in_the_code():
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row[-2])}
    files = [*(ROOT / "unclip_pl").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert len(names) >= 40
    assert not [name for name in names if not re.search(rf"\b{name}\b", code)]


def test_the_tutorial_makes_shards(tmp_path, monkeypatch):
    """Its Python files, as they stand on the page, one after the other in an empty folder."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M):
        Path("step.py").write_text(code)
        runpy.run_path("step.py")
    shards = expand("data/{00000..00004}.tar")
    assert all(Path(shard).is_file() for shard in shards)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    missing = "the documentation is not built here: pip install -e '.[docs]'"
    for package in ("sphinx", "myst_parser", "pydata_sphinx_theme", "sphinx_copybutton"):
        pytest.importorskip(package, reason=missing)
    build = ["-m", "sphinx", "-q", "-W", "--keep-going", "-j", "2", "-d", str(tmp_path / "trees")]
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, *build, str(DOCS), str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    api = [page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html")]
    assert (site / "index.html").is_file() and any("UnCLIP.generate" in page for page in api)
