"""Links within the documentation lead somewhere, marked examples run and print what the page says, and the site builds."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)])
FENCE = re.compile(r"^( *)```(.*?)^\1```", re.MULTILINE | re.DOTALL)
# A marked example, and the output that the page states right after it, if it does.
RUNNABLE = re.compile(r"^<!-- runnable -->\n```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def prose(page):
    """The text of a page without code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text("utf-8")))


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def links(page):
    """The targets of a page's links and pictures within the repository."""
    for target in re.findall(r"\]\(<?([^)>\s]+)>?(?: \"[^\"]*\")?\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    dead = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and found.suffix == ".md" and anchor not in anchors(found)):
            dead.append(target)
    assert dead == []


def test_dead_links_are_seen(tmp_path):
    (tmp_path / "other.md").write_text("# A `title`, here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#a-title-here) [b](other.md#b) [c](none.md) `[d](none.md)` ![e](none.png)\n```\n[f](none)\n```\n"
    )
    assert list(links(page)) == ["other.md#a-title-here", "other.md#b", "none.md", "none.png"]
    assert anchors(tmp_path / "other.md") == {"a-title-here"}


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(
        r"^([\w/.-]+)$", "\n".join(re.findall(r"```{toctree}(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)), re.M
    )
    sources = [*PAGES, *(ROOT / "docs").glob("notebooks/*.ipynb")]
    pages = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in sources if page.is_relative_to(ROOT / "docs")}
    assert sorted(listed) == sorted(pages - {"index"})


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if RUNNABLE.search(page.read_text("utf-8"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_marked_examples_run(page, tmp_path, monkeypatch):
    """The examples of a page run in order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code, output in RUNNABLE.findall(page.read_text("utf-8")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        if output:
            assert printed.getvalue() == output


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra `docs`")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'id="resnet_export.to_onnx"' in (tmp_path / "api" / "resnet_export.html").read_text("utf-8")
