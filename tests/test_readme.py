"""Every Python block of the README runs as it stands, and the files it points to exist."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


RUNNABLE = [
    (page, i)
    for page in (ROOT / "README.md", ROOT / "docs" / "method.md", ROOT / "docs" / "start-here.md")
    for i in range(len(blocks(page)))
]


def test_readme_has_blocks():
    assert len(blocks(ROOT / "README.md")) >= 2


@pytest.mark.parametrize(("page", "i"), RUNNABLE, ids=lambda value: getattr(value, "name", value))
def test_block_runs(page, i):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(blocks(page)[i], f"{page.name}, block {i}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = [h.strip().lower() for h in re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)]
            slugs = [re.sub(r"[^\w\- ]", "", h).replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{page.name} links to {target}; the headings there are {slugs}"
