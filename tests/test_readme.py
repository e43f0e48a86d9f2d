"""Python blocks of the pages named in RUNS run as they stand, and what any page links to exists."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


RUNS = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("method", "extend", "family", "faq", "start-here")),
]
TUTORIAL = ROOT / "docs" / "tutorial.md"  # its blocks build on each other
RUNNABLE = [(page, i) for page in RUNS for i in range(len(blocks(page)))]


def test_readme_has_blocks():
    assert len(blocks(ROOT / "README.md")) >= 2


@pytest.mark.parametrize(("page", "i"), RUNNABLE, ids=lambda value: getattr(value, "name", value))
def test_block_runs(page, i):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(blocks(page)[i], f"{page.name}, block {i}", "exec"), {"__name__": "readme"})


def test_tutorial_runs_block_after_block(tmp_path, monkeypatch, capsys):
    """And its text says what comes out: which branch leads, that the right half memorises, what is
    recommended.
    """
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names = {"__name__": "tutorial"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i, block in enumerate(blocks(TUTORIAL)):
            exec(compile(block, f"{TUTORIAL.name}, block {i}", "exec"), names)
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "tutorial.png").stat().st_size > 10_000
    before, after = (names[run].series("accuracy", "held_out")[-1] for run in ("joint", "arl"))
    assert before[1] < 0.45
    assert after[1] > 0.7 > after[2]
    assert after[1] > after[0]
    assert names["arl"].series("accuracy", "epochs")[-1, 2] > 0.95
    assert names["arl"].series("gains", "epochs")[-1, 1] > 1.6
    verdict = names["diagnosis"].verdict
    assert verdict.recommendation == "weights"
    assert 0.08 < verdict.differences["weights"].mean < 0.15
    assert any("right memorises" in reason for reason in verdict.reasons)
    assert capsys.readouterr().out.count("epoch   steps") == 2


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
