"""The documentation site: its menu has every page, its reference every name, and its blocks of Python run."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo
from test_readme import RUNS, blocks

import arl_fast

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PARTS = [DOCS / "loops.md"]  # its blocks are parts of a loop, and need the names of `loop`
ELSEWHERE = [*RUNS, DOCS / "tutorial.md", DOCS / "fusion.md"]  # test_readme.py and test_fusion.py run these
WHOLE = [page for page in sorted(DOCS.glob("*.md")) if page not in (*ELSEWHERE, *PARTS)]
BLOCKS = [(page, i) for page in WHOLE for i in range(len(blocks(page)))]


def test_every_page_is_in_the_menu():
    menu = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(page.name for page in DOCS.glob("*.md")), "mkdocs.yml: nav"


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: arl_fast\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    classes_and_functions = [name for name in arl_fast.__all__ if callable(getattr(arl_fast, name))]
    assert sorted(listed) == sorted(classes_and_functions)


@pytest.mark.parametrize(("page", "i"), BLOCKS, ids=lambda value: getattr(value, "name", value))
def test_block_runs(page, i):
    exec(compile(blocks(page)[i], f"{page.name}, block {i}", "exec"), {"__name__": "docs"})


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = torch.nn.Linear(3, 4), torch.nn.Linear(5, 4)
        self.head = arl_fast.ConcatHead({"audio": 4, "visual": 4}, num_classes=6)
        self.criterion = arl_fast.ARLLoss(reduction="sum")

    def forward(self, audio: torch.Tensor, visual: torch.Tensor) -> arl_fast.BranchLogits:
        return self.head({"audio": self.audio(audio), "visual": self.visual(visual)})


@pytest.fixture
def loop():
    """What the blocks of loops.md take from the loop around them, in a group of one process."""
    from arl_fast.integrations.huggingface import compute_loss_func

    audio, visual = torch.randn(8, 3), torch.randn(8, 5)
    za, zv = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    model, target = Model(), torch.randint(6, (8,))

    def trainer(model, args, compute_loss_func, **_):
        out = model(audio, visual)
        outputs = {"fused": out.fused, **out.unimodal, "link": out.link}
        assert compute_loss_func(outputs, target, num_items_in_batch=8).isfinite()

    names = {"arl_fast": arl_fast, "torch": torch, "F": torch.nn.functional, "Trainer": trainer, "data": None}
    names |= {"compute_loss_func": compute_loss_func, "args": SimpleNamespace(), "model": model}
    names |= {"audio": audio, "visual": visual, "za": za, "zv": zv, "target": target}
    names |= {
        "criterion": arl_fast.ARLLoss(),
        "shard": {"audio": torch.randn(6, 4), "visual": torch.randn(6, 4)},
    }
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield names | {"group": dist.group.WORLD}
    dist.destroy_process_group()


@needs_gloo
@pytest.mark.parametrize("i", range(len(blocks(PARTS[0]))))
def test_part_of_a_loop_runs(i, loop):
    exec(compile(blocks(PARTS[0])[i], f"{PARTS[0].name}, block {i}", "exec"), loop)
