"""The held-out rows in float64, chunk by chunk, as often as the fit passes over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.branches import BranchLogits, as_branch_logits, mask_of
from ..loss import ARLLoss
from .formula import Formula

FOLDS = 5  # the report is cross-fitted: weights from four fifths of the rows judge the other fifth
_CHUNK = 2**20  # logits of one branch that are looked at together


class Chunk(NamedTuple):
    """Rows in float64. n = samples x positions; a sample is the unit of folds and of standard errors.

    With several labels per row (task "multilabel") each pair of a position and a label is a row of its own,
    of the two classes "no" and "yes" with the logits 0 and x: the softmax of these is sigmoid(x).
    """

    base: Tensor  # [n, C]
    designs: Tensor  # [K, n, C]: what the weights multiply
    branches: Tensor  # [K, n, C]: what has a temperature
    present: Tensor  # [K, n], 1 where the design is there
    target: Tensor  # [n, C] coefficients of -log p
    size: Tensor  # [n] what a row adds to the denominator of the mean
    label: Tensor  # [n] the class that counts as correct
    valid: Tensor  # [n], 1 where there is a target
    fold: Tensor  # [n]
    positions: int

    def by_sample(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., samples], sums over positions."""
        return x.unflatten(-1, (-1, self.positions)).sum(-1)


def as_batches(out: Any, target: Tensor | None, mask: Tensor | None) -> Iterable:
    """An iterable of (out, target, mask or None) that can be passed over again."""
    if target is not None:
        return [(as_branch_logits(out), target, mask_of(out) if mask is None else mask)]
    if isinstance(out, BranchLogits) or not isinstance(out, Iterable):
        got = type(out).__name__
        raise TypeError(f"target: got None for {got}, expected one, or an iterable of (BranchLogits, target)")
    if mask is not None:
        raise TypeError("mask: got one beside an iterable, expected tuples of (BranchLogits, target, mask)")
    return _Named(list(out) if isinstance(out, Iterator) else out)


class _Named:
    """An iterable of tuples, as (BranchLogits, target, mask or None)."""

    def __init__(self, source: Iterable) -> None:
        self.source = source

    def __iter__(self) -> Iterator:
        for i, batch in enumerate(self.source):
            if type(batch) not in (tuple, list) or len(batch) not in (2, 3):
                got = type(batch).__name__
                raise TypeError(f"out: got {got} as batch {i}, expected (BranchLogits, target[, mask])")
            out, target, mask = (*batch, None)[:3]
            yield as_branch_logits(out), target, mask_of(out) if mask is None else mask


class Rows:
    """The held-out rows, chunk by chunk, as often as asked; checked the first time, compared after that."""

    def __init__(self, formula: Formula, batches: Iterable, criterion: ARLLoss) -> None:
        """
        Args:
            criterion: with rule "none", whose task, weights and ignored targets count.
        """
        self.formula, self.batches, self.criterion = formula, batches, criterion
        self.passes, self.signature = 0, 0.0
        # balanced folds in an order of which no pattern of the rows can be a multiple
        generator = torch.Generator().manual_seed(0)
        self.folds = torch.rand(997, FOLDS, generator=generator).argsort(1).flatten()

    def __iter__(self) -> Iterator[Chunk]:
        start, signature = 0, 0.0
        for out, target, mask in self.batches:
            if self.passes == 0:
                self.criterion(out, target, mask)  # raises what the loss raises
            step = max(1, _CHUNK // max(1, out.fused[:1].numel()))
            for low in range(0, len(out.fused), step):
                chunk = self._chunk(out, target, mask, slice(low, low + step), start + low)
                signature += float(((chunk.label + 1) * (chunk.fold + 2) * chunk.valid).sum())
                yield chunk
            start += len(out.fused)
        self.passes += 1
        if self.passes == 1:
            if signature == 0:
                raise ValueError(
                    "target: got no row with a target, all are ignore_index or NaN; expected at least one"
                )
            self.signature = signature
        elif signature != self.signature:
            raise ValueError(
                "out: got other rows or another order when iterated again, expected the same (shuffle=False)"
            )

    def _chunk(
        self, out: BranchLogits, target: Tensor, mask: Tensor | None, rows: slice, start: int
    ) -> Chunk:
        formula, fused = self.formula, out.fused[rows].double()
        samples = len(fused)
        branches = [x[rows].double() for x in formula.ordered(out)]
        shape = [samples] + [1] * (fused.dim() - 1)
        present = None if mask is None else mask[rows]

        flags = None if present is None else [column.view(shape) for column in present.unbind(1)]
        base, evidence = formula.parts(branches, flags)
        if flags is not None:
            branches = [torch.where(p, x, 0.0) for p, x in zip(flags, branches, strict=True)]
        if formula.pool:
            evidence = branches = [fused, *branches]
        base = _flat(base.expand(fused.shape))
        designs, tempered = (torch.stack([_flat(x) for x in xs]) for xs in (evidence, branches))
        if self.criterion.options.task == "multilabel":
            base, designs, tempered = _no_and_yes(base), _no_and_yes(designs), _no_and_yes(tempered)
            truth = self._labels(target[rows])
        else:
            truth = self._classes(target[rows], fused)
        q, size, label, valid = truth

        positions = base.shape[0] // max(1, samples)
        there = torch.ones(designs.shape[:2], dtype=torch.float64, device=fused.device)
        if present is not None:
            there[-present.shape[1] :] = present.repeat_interleave(positions, 0).T.double()
        designs, tempered = (torch.where(valid[:, None], x, 0.0) for x in (designs, tempered))
        if not bool(torch.isfinite(designs).all()):
            raise ValueError(
                "out: got logits that are not finite, in a row with a target and a modality that is present"
            )
        fold = self.folds[torch.arange(start, start + samples) % len(self.folds)].to(fused.device)
        fold = fold.repeat_interleave(positions)
        return Chunk(base, designs, tempered, there, q, size, label, valid.double(), fold, positions)

    def _classes(self, target: Tensor, fused: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of class indices or probabilities: Chunk's target, size and label, and which rows have a target."""
        classes, weight = fused.shape[1], self.criterion.weight
        if target.is_floating_point():
            q = _flat(target.double())
            label, size = q.argmax(1), torch.ones_like(q[:, 0])
            return q if weight is None else q * weight.to(q), size, label, torch.ones_like(size).bool()
        flat = target.reshape(-1).long()
        valid = flat != self.criterion.options.ignore_index
        label = torch.where(valid, flat, 0)
        if int(label.amin()) < 0 or int(label.amax()) >= classes:
            raise ValueError(f"target: got a class outside 0 to {classes - 1}")
        of_class = label.new_ones(classes).double() if weight is None else weight.to(fused)
        size = of_class[label] * valid
        q = torch.zeros(len(label), classes, dtype=torch.float64, device=fused.device)
        return q.scatter_(1, label[:, None], size[:, None]), size, label, valid

    def _labels(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of labels t in [0, 1], whose coefficients are w (1 - t) and w pos_weight t."""
        flat = _flat(target.double())
        valid = ~flat.isnan()
        yes = flat.nan_to_num()
        coefficients = [(1 - yes) * valid, yes * valid]
        if self.criterion.pos_weight is not None:
            coefficients[1] = coefficients[1] * self.criterion.pos_weight.to(yes)
        if self.criterion.weight is not None:
            coefficients = [c * self.criterion.weight.to(yes) for c in coefficients]
        q = torch.stack(coefficients, -1).flatten(0, 1)
        valid = valid.flatten()
        return q, valid.double(), (yes > 0.5).long().flatten(), valid


def _no_and_yes(x: Tensor) -> Tensor:
    """Logits [..., n, C] of labels -> [..., n C, 2] of "no" and "yes"."""
    return torch.stack([torch.zeros_like(x), x], -1).flatten(-3, -2)


def _flat(x: Tensor) -> Tensor:
    """[B, C, d1, ...] -> [B d1 ..., C]."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])
