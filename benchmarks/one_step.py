"""One forward pass on a GPU, for a profiler: python -m benchmarks.one_step BATCH CLASSES DTYPE."""

from __future__ import annotations

import sys

import torch

from arl_fast import arl_loss

from .cases import Case, make


def main() -> None:
    batch, classes, dtype = sys.argv[1:]
    case = Case("one", int(batch), int(classes), 2, dtype)
    logits, target = make(case, "cuda")
    leaves = [x.requires_grad_() for x in logits]
    arl_loss(leaves[0], leaves[1:], target, rule="none")
    torch.cuda.synchronize()
    print(f"{case.label}: {case.elements * logits[0].element_size()} bytes of logits")


if __name__ == "__main__":
    main()
