"""What is measured: shapes by suite, logits like a trained model's, and the bytes that no implementation can
save.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAMMA, TEMPERATURE = 1.0, 8.0


IMAGES = 32  # of the suite "dense"


class Case(NamedTuple):
    """One shape: M+1 logits tensors [batch, classes] of a dtype.

    In the suite "labels" classes are labels. In the suite "dense" the rows are the positions of images.
    """

    suite: str
    batch: int
    classes: int
    modalities: int
    dtype: str

    @property
    def task(self) -> str:
        return "multilabel" if self.suite == "labels" else "multiclass"

    @property
    def label(self) -> str:
        return f"{self.suite}-{self.batch}x{self.classes}-M{self.modalities}-{self.dtype}"

    @property
    def elements(self) -> int:
        """Logits of all branches."""
        return (self.modalities + 1) * self.batch * self.classes

    @property
    def floor_bytes(self) -> int:
        """Forward and backward read each logit once and write each gradient once: 2 (M+1) B C e."""
        return 2 * self.elements * getattr(torch, self.dtype).itemsize


def _suite(name: str, shapes: list[tuple[int, int, int, str]]) -> list[Case]:
    return [Case(name, *shape) for shape in shapes]


F32, BF16 = "float32", "bfloat16"

SUITES: dict[str, list[Case]] = {
    # B = 64 as in the paper; CREMA-D, AVE, Kinetics-Sounds, UCF-101, VGGSound, and MOSI with its three
    # modalities
    "paper": _suite("paper", [(64, c, 2, F32) for c in (6, 28, 34, 101, 309)] + [(64, 2, 3, F32)]),
    "modalities": _suite("modalities", [(64, 101, 3, F32), (64, 101, 6, F32), (64, 309, 2, BF16)]),
    "large": _suite("large", [(2048, 1000, 2, F32), (1024, 32000, 2, F32)]),
    "large-bf16": _suite("large-bf16", [(2048, 1000, 2, BF16)]),
    # a yes or no for every label: a movie's genres, facial action units, and wide tagging
    "labels": _suite("labels", [(64, c, 2, F32) for c in (1, 6, 28, 309)] + [(2048, 1000, 2, F32)])
    + _suite("labels", [(64, 28, 2, BF16), (2048, 1000, 2, BF16)]),
    # on a GPU only
    "huge": _suite("huge", [(1024, 32000, 2, BF16), (8192, 32000, 2, BF16), (2048, 32000, 6, F32)]),
    # many rows of few classes, bound by memory where a kernel is good
    "narrow": _suite("narrow", [(65536, 28, 2, F32), (131072, 21, 2, F32)]),
    # dense prediction as a network returns it, [32, 21, 4096]: the positions of a class side by side
    "dense": _suite("dense", [(32 * 64 * 64, 21, 2, F32)]),
    "vocabulary": _suite("vocabulary", [(8192, 128256, 2, BF16)]),  # on a GPU only
    "scaling-batch": _suite("scaling-batch", [(b, 101, 2, F32) for b in (4, 16, 64, 256, 1024, 4096)]),
    "scaling-classes": _suite(
        "scaling-classes", [(64, c, 2, F32) for c in (2, 16, 64, 256, 1024, 4096, 16384)]
    ),
    "scaling-modalities": _suite("scaling-modalities", [(64, 101, m, F32) for m in (1, 2, 3, 4, 6, 8)]),
    "tiny": _suite("tiny", [(8, 5, 2, F32), (4, 33, 3, BF16)]),  # for the tests of the benchmarks
}


def make(case: Case, device: str, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Logits of the M+1 branches, the fused one first, and targets.

    Logits of a model in training: the true class stands out by 0 to 8, so that p_y covers (0, 1), and every
    branch is of another confidence. Never zeros, which hide errors and run faster than real data on a GPU.
    Labels are float32, a quarter of them yes, and logits lean towards them in the same way.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    kind = dict(generator=generator, device=device)
    labels = case.task == "multilabel"
    if labels:
        target = (torch.rand(case.batch, case.classes, **kind) < 0.25).float()
    else:
        target = torch.randint(0, case.classes, (case.batch,), **kind)
    logits = []
    for branch in range(case.modalities + 1):
        x = torch.randn(case.batch, case.classes, **kind)
        margin = 8 * torch.rand(case.batch, 1, **kind) / (1 + branch)
        x = x + margin * (target - 0.5) if labels else x.scatter_add_(1, target.unsqueeze(1), margin)
        logits.append(x.to(getattr(torch, case.dtype)))
    if case.suite == "dense":
        logits = [x.view(IMAGES, -1, case.classes).transpose(1, 2).contiguous() for x in logits]
        target = target.view(IMAGES, -1)
    return logits, target
