"""BranchLogits, what a head returns and a loss takes; Targets, what they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

Unimodal = Mapping[str, Tensor] | Sequence[Tensor]


class BranchLogits(NamedTuple):
    """The M+1 predictions of one head for one batch.

    Attributes:
        fused: [B, C] or [B, C, d1, ...] logits of the whole model.
        unimodal: one logits tensor of the same shape per modality, as a dict by name or a sequence.
        link: what ``modulate`` returned, [M]; None where no gradient is to be scaled.
    """

    fused: Tensor
    unimodal: Unimodal
    link: Tensor | None = None


class Targets(NamedTuple):
    """What the logits of all branches are compared with.

    Attributes:
        target: class indices (int64, int32), or class probabilities of the logits' shape.
        mask: [B, M] bool, False where a modality is absent; None: all are present.
        weight: [C] class weights; None: 1.
        divisor: [M+1] what reduction "mean" divides the gradients of each branch by, where these rows are
            only a part of the batch; None: it is counted. Callers of the loss do not give it.
        pos_weight: [C] weight of a "yes" of each label, for task "multilabel"; None: 1.
    """

    target: Tensor
    mask: Tensor | None = None
    weight: Tensor | None = None
    divisor: Tensor | None = None
    pos_weight: Tensor | None = None


def as_branch_logits(output: object) -> BranchLogits:
    """BranchLogits from itself, a tuple (fused, unimodal[, link]) or a dict with "fused" and modalities."""
    if isinstance(output, BranchLogits):
        return output
    # before Mapping, an abstract class, whose check takes a microsecond
    if isinstance(output, (tuple, list)) and len(output) in (2, 3) and not isinstance(output[1], Tensor):
        return BranchLogits(*output)
    if isinstance(output, Mapping):
        if "fused" not in output:
            keys = list(output)
            raise ValueError(
                f'output: got a dict with the keys {keys}, expected "fused", the modalities and, optionally, '
                '"link"'
            )
        unimodal = {name: x for name, x in output.items() if name not in ("fused", "link", "mask")}
        return BranchLogits(output["fused"], unimodal, output.get("link"))
    if isinstance(output, (tuple, list)):
        what = f"a {type(output).__name__} of {len(output)}: ({', '.join(type(o).__name__ for o in output)})"
    else:
        what = type(output).__name__
    raise TypeError(
        f"output: got {what}, expected BranchLogits(fused, unimodal, link), a tuple "
        '(fused, [x_1, ..., x_M], link) or a dict {"fused": ..., name: ..., "link": ...}'
    )


def mask_of(output: object) -> Tensor | None:
    """The mask [B, M] that comes with an output: a dict's entry "mask", or what a head left on its link."""
    if isinstance(output, Mapping) and output.get("mask") is not None:
        return output["mask"]
    return getattr(as_branch_logits(output).link, "mask", None)


def to_rows(x: Tensor) -> Tensor:
    """[B, C, d1, ...] -> [B d1 ..., C]; a view where the memory allows it (channels-last)."""
    return x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def from_rows(g: Tensor, shape: Sequence[int]) -> Tensor:
    """[B d1 ..., C] -> [B, C, d1, ...] of the given shape; a view."""
    return g if len(shape) == 2 else g.view(*shape[:1], *shape[2:], shape[1]).movedim(-1, 1)


def targets_to_rows(targets: Targets, logits: Tensor) -> Targets:
    """Targets of logits [B, C, d1, ...] -> of their rows [N, C]; a mask holds at all positions."""
    target, mask = targets.target, targets.mask
    if mask is not None and logits.dim() > 2:
        mask = mask.repeat_interleave(logits.shape[2:].numel(), 0)
    return targets._replace(
        target=to_rows(target) if target.is_floating_point() else target.reshape(-1), mask=mask
    )
