"""The site: it builds strictly, needs no network, and says of every public name and method what the package says."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_prune
from lightning_prune.commands.methods import described
from lightning_prune.methods import discover

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "api"


def documented() -> set[str]:
    """What the reference shows, as it is imported."""
    pages = "".join(page.read_text("utf-8") for page in REFERENCE.glob("*.md"))
    return set(re.findall(r"^\.\. auto(?:class|function|module):: (\S+)$", pages, re.MULTILINE))


def test_every_public_name_is_in_the_reference_and_has_a_docstring():
    names = {f"lightning_prune.{name}" for name in lightning_prune.__all__ if name not in discover()}
    assert names - documented() == set()
    kinds = re.findall(r"^<!-- methods: (\w+) -->$", (REFERENCE / "methods.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(kinds) == sorted({method.kind for method in discover().values()} | {"control"})
    assert [name for name in lightning_prune.__all__ if not inspect.getdoc(getattr(lightning_prune, name))] == []


def test_choosing_a_method_shows_what_the_methods_command_says():
    rows = re.findall(r"^\| \[(\w+)\]\((\S+)\) \| (.+?) \| (.+?) \| (.+?) \| .+ \|$", choosing(), re.MULTILINE)
    shown = {name: tuple(rest) for name, *rest in rows if name in discover()}
    said = {name: described(method) for name, method in discover().items()}
    assert shown == {
        name: (f"methods/{row['module'].rpartition('.')[2]}.md", row["removes"], row["needs"], row["default_schedule"])
        for name, row in said.items()
        if method_takes_a_budget(name)
    }


def choosing() -> str:
    return (DOCS / "choosing.md").read_text("utf-8").split("## All methods")[1]


def method_takes_a_budget(name: str) -> bool:
    return discover()[name].kind != "control"


def test_every_page_is_in_a_list_of_the_site():
    index = (DOCS / "index.md").read_text("utf-8")
    lists = re.findall(r"^:::\{toctree\}\n(.*?)^:::$", index, re.MULTILINE | re.DOTALL)
    listed = {line for block in lists for line in block.splitlines() if line and not line.startswith(":")}
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert pages == listed - {"methods/*", "api/index"}
    assert {"methods/*", "api/index"} <= listed


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, with warnings as errors."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    folder = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-n", "-d", str(folder / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(folder / "html")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.slow  # builds the site, some ten seconds
@pytest.mark.processes  # as a user builds it
def test_site_builds_without_a_warning_and_fetches_nothing(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    fetched = re.compile(r'<(?:script|img|iframe)[^>]*\bsrc="(?:https?:)?//|<link[^>]*\bhref="(?:https?:)?//')
    assert [page.name for page in pages if fetched.search(page.read_text("utf-8"))] == []
    sheets = re.compile(r"@import|url\(['\"]?(?:https?:)?//")
    assert [sheet.name for sheet in site.rglob("*.css") if sheets.search(sheet.read_text("utf-8"))] == []


@pytest.mark.slow  # see above
@pytest.mark.processes  # see above
def test_equations_are_drawn_by_the_browser_alone(site):
    page = (site / "methods" / "rigl.html").read_text("utf-8")
    assert page.count("<math") > 5
    assert len(re.findall(r'<div class="equation[^"]*">\s*<math[^>]* display="block"', page)) == 1
    assert "\\mathrm" not in page


@pytest.mark.slow  # see above
@pytest.mark.processes  # see above
def test_reference_links_a_name_in_a_docstring_to_its_entry(site):
    page = (site / "api" / "methods.html").read_text("utf-8")
    assert re.search(r'<a class="reference internal" href="writing\.html#lightning_prune\.ChannelPruner"', page)
    assert [name for name in discover() if f'id="lightning_prune.{name}"' not in page] == []
