"""The pages of docs/: their examples run in order, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
import small
import torch

# Processes are started.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    text = page.read_text()
    with small.isolated(), torch.random.fork_rng():
        for block in BLOCK.finditer(text):
            # Lines are the page's in a traceback.
            lines = "\n" * text.count("\n", 0, block.start(1))
            exec(compile(lines + block[1], str(page), "exec"), names)


def test_the_pages_that_need_examples_have_some():
    pages = {page.stem: len(BLOCK.findall(page.read_text())) for page in PAGES}
    assert pages.keys() >= {"training", "serving", "performance", "design"}
    assert all(pages[name] for name in ("training", "serving", "performance"))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
