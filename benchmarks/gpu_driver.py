"""Small native steps on a GPU for compute-sanitizer: every kernel once, without pytest and without cuBLAS.

compute-sanitizer --tool memcheck python -m benchmarks.gpu_driver
python -m benchmarks.gpu_driver --device cpu       the same steps, to see that they run
"""

from __future__ import annotations

import argparse

import torch

from arl_fast import arl_loss, modulate

# One shape for each kernel: few classes, a warp per row, a block per row, and rows beyond the registers.
SHAPES = ((5, 3), (33, 129), (3, 1000), (3, 5003), (2, 30001))
# Rows and labels: fewer than a vector, rows that end within one, and enough to be counted in a launch before.
LABELS = ((3, 1), (7, 5), (3000, 3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def steps(device: str) -> int:
    """Run every step; returns how many. The result is compared with float64 on the CPU."""
    count = 0
    generator = torch.Generator().manual_seed(0)
    for batch, classes in SHAPES:
        for dtype in DTYPES:
            for kind in ("indices", "soft", "weights"):
                logits = [torch.randn(batch, classes, generator=generator).to(dtype) for _ in range(3)]
                target = torch.randint(0, classes, (batch,), generator=generator)
                if kind == "soft":
                    target = torch.softmax(torch.randn(batch, classes, generator=generator), 1)
                given: dict = {"mask": torch.rand(batch, 2, generator=generator) > 0.2}
                if kind == "weights":
                    given |= {"weight": torch.rand(classes, generator=generator), "label_smoothing": 0.1}
                want = arl_loss(
                    logits[0].double(), [x.double() for x in logits[1:]], target, rule="none", **given
                )[0]
                moved = {
                    name: value.to(device) if isinstance(value, torch.Tensor) else value
                    for name, value in given.items()
                }
                leaves = [x.to(device).requires_grad_() for x in logits]
                marked, link = modulate(leaves[1:])
                loss, _ = arl_loss(leaves[0], marked, target.to(device), link, **moved)
                loss.backward(torch.full_like(loss, 2.0))
                torch.testing.assert_close(loss.detach().cpu().double(), want, rtol=1e-4, atol=1e-4)
                count += 1
    return count


def steps_of_labels(device: str) -> int:
    """The same for task="multilabel": whole vectors and none, weights, a loss per pair, a counting launch."""
    count = 0
    generator = torch.Generator().manual_seed(0)
    for shape in LABELS:
        for dtype in DTYPES:
            for reduction, weighted in (("mean", False), ("mean", True), ("none", True)):
                logits = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
                target = torch.rand(shape, generator=generator)
                target[0, 0] = torch.nan
                given: dict = {"mask": torch.rand(shape[0], 2, generator=generator) > 0.2}
                if weighted:
                    given["pos_weight"] = torch.rand(shape[1], generator=generator)
                chosen: dict = {"task": "multilabel", "reduction": reduction}
                want = arl_loss(
                    logits[0].double(),
                    [x.double() for x in logits[1:]],
                    target,
                    rule="none",
                    **given,
                    **chosen,
                )[0]
                moved = {name: value.to(device) for name, value in given.items()}
                leaves = [x.to(device).requires_grad_() for x in logits]
                marked, link = modulate(leaves[1:])
                loss, _ = arl_loss(leaves[0], marked, target.to(device), link, **moved, **chosen)
                loss.backward(torch.full_like(loss, 2.0))
                torch.testing.assert_close(loss.detach().cpu().double(), want, rtol=1e-4, atol=1e-4)
                count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    count = steps(device) + steps_of_labels(device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} steps on {device}")


if __name__ == "__main__":
    main()
