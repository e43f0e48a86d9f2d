"""The contract and the link once more on a GPU, for every implementation that serves it."""

# ruff: noqa: F811, the fixtures of gpu.py are parameters here

from __future__ import annotations

import pytest
from gpu import DEVICE, implementation, on_device, plain_device, poisoned  # noqa: F401  first: it skips without a GPU
from test_contract import *  # noqa: F403  their tests are collected here again, with the fixtures of gpu.py
from test_contract import make, run
from test_link import *  # noqa: F403
from test_multilabel import test_against_truth as test_labels_against_truth  # noqa: F401
from test_multilabel import test_extreme_logits as test_extreme_labels  # noqa: F401
from test_multilabel import test_poisoned_rows_are_never_read as test_poisoned_labels  # noqa: F401

pytestmark: list = []  # not that of test_contract


def test_target_out_of_range(implementation):
    """Checking would stall: the row's loss and what it enters is NaN; nothing outside is read."""
    if DEVICE == "cpu":
        pytest.skip("an error on a CPU")
    logits, target = make()
    for bad in (5, -1, 2**40):
        target[3] = bad
        loss, grads, stats = run(logits, target)
        assert loss.isnan()
        assert stats.loss.isnan().all()
        for g in grads:
            assert g[3].isnan().all()
        rows, _, _ = run(logits, target, reduction="none")
        assert rows.isnan().tolist() == [i == 3 for i in range(len(target))]
