"""The loss for logits of which every process holds some of the classes: one all-gather, in plain torch.

A process reduces each of its rows to a few numbers, taken relative to the largest logit that it holds, so
that nothing overflows. After the exchange every process joins the shards' numbers to those of the whole row,
and forms the gradient of its own classes. Logits never leave their process.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._core import rules
from .._core.branches import Targets
from .._core.checks import check_class_range
from .._core.collectives import Group, all_gather
from .._core.dtypes import compute_dtype, grad_dtype
from .._core.options import Options, Schedule
from . import reference

_SPLIT = 1 << 20  # class numbers cross the wire as two floats, each exact in float32


class Sharded(NamedTuple):
    """An implementation of the contract for logits [N, C/processes]; its class weights are sharded, too.

    Attributes:
        group: the processes that hold the classes, in the order of the ranks; None: this one holds all.
        offset: the number of this process's first class.
    """

    group: Group | None = None
    offset: int = 0

    def forward(
        self, logits: Sequence[Tensor], targets: Targets, schedule: Schedule, options: Options, grad: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As reference.forward. All processes get the same loss and packed vector, each its own gradients."""
        target, mask, weight, divisor, _ = targets
        dtype, device = compute_dtype(logits[0].dtype), logits[0].device
        n, classes = logits[0].shape
        weights = torch.ones(classes, dtype=dtype, device=device) if weight is None else weight
        hard = not target.is_floating_point()
        seen: _Classes | _Probabilities
        if hard:
            labelled = target != options.ignore_index
            seen = _Classes.of(target, labelled, self.offset, weights)
        else:
            labelled = torch.ones(n, dtype=torch.bool, device=device)
            seen = _Probabilities(target.to(dtype), target.to(dtype) * weights)

        values = [x.to(dtype) for x in logits]
        rows = torch.stack([_local_rows(x, seen, weights, options) for x in values])  # [M+1, 9, N]
        shards = self._exchange(rows, seen, weights)
        poison = _check_layout(shards, device).to(dtype)  # 0, or NaN for what is an error on a CPU
        if hard:
            poison = poison + _check_range(target, labelled, shards.total_classes, options).to(dtype)

        gamma = rules.effective_gamma(schedule)
        smoothing = options.label_smoothing
        spread = smoothing / shards.total_classes.to(dtype)  # what smoothing gives to each class
        row_mass = shards.mass.sum(0)
        row_divisor = row_mass if hard else torch.ones_like(row_mass)
        pull = (1 - smoothing) * row_mass + spread * shards.weight_sum.sum() + poison
        sums, grads, row_losses = [], [], []
        for branch, x in enumerate(values):
            valid = labelled if mask is None or branch == 0 else labelled & mask[:, branch - 1]
            joined = _join(shards, branch)
            loss = (1 - smoothing) * joined.loss + poison
            if smoothing:
                loss = loss + spread * joined.smooth
            dependence = joined.confidence if options.dependence == "confidence" else joined.l1
            one = torch.ones_like(loss)
            terms = torch.stack([loss, row_divisor, one, joined.correct, joined.entropy, dependence + poison])
            terms = torch.where(valid, terms, 0)
            sums.append(terms.sum(1))
            row_losses.append(terms[0])
            if grad:
                log_p = (x - joined.top.unsqueeze(1)) - joined.log_partition.unsqueeze(1)
                if isinstance(seen, _Classes) and not smoothing:
                    g = seen.minus_target(log_p.exp(), joined.others) * (row_mass + poison).unsqueeze(1)
                else:
                    g = seen.subtract(log_p.exp() * pull.unsqueeze(1) - spread * weights, 1 - smoothing)
                scale = one
                if options.reduction == "mean":
                    scale = scale / (sums[-1][1] if divisor is None else divisor[branch])
                if branch > 0:
                    scale = scale * rules.gamma_of(gamma, branch - 1)
                g = torch.where(valid.unsqueeze(1), g * scale.unsqueeze(1), 0)
                grads.append(g.to(grad_dtype(logits[branch].dtype)))
        loss, packed = rules.finish(torch.stack(sums, 1), schedule, options)
        if options.reduction == "none":
            loss = row_losses[0] + rules.weighted_sum(gamma, torch.stack(row_losses[1:]))
        return loss, packed, grads

    def _exchange(self, rows: Tensor, seen: _Classes | _Probabilities, weights: Tensor) -> _Shards:
        """The one collective: each process's rows, what it sees of the target, and which classes it holds."""
        n, classes = rows.shape[2], weights.shape[0]
        place = _place(self.offset, classes, rows.dtype, rows.device)
        sent = torch.cat([rows.reshape(-1), seen.mass(), seen.tallest(), place, weights.sum().reshape(1)])
        received = sent.unsqueeze(0) if self.group is None else all_gather(sent, self.group)
        parts, mass, tallest, place, weight_sum = received.split([rows.numel(), n, n, 4, 1], 1)
        offsets, counts = (place[:, ::2].long() * _SPLIT + place[:, 1::2].long()).unbind(1)
        owner = tallest.argmax(0)
        return _Shards(
            parts.view(received.shape[0], *rows.shape), mass, owner, offsets, counts, weight_sum.squeeze(1)
        )

    def scale(
        self, grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool
    ) -> Sequence[Tensor]:
        """As reference.scale."""
        return reference.scale(grads, upstream, factor, dtype, keep)

    def modulate_backward(self, grads: Sequence[Tensor | None], link: Tensor) -> Sequence[Tensor | None]:
        """As reference.modulate_backward."""
        return reference.modulate_backward(grads, link)


@functools.lru_cache(maxsize=64)
def _cached_place(offset: int, classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(
        [offset // _SPLIT, offset % _SPLIT, classes // _SPLIT, classes % _SPLIT], dtype=dtype, device=device
    )


def _place(offset: int, classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which classes are here, [4]. Cached: copying numbers to a GPU in every step would wait for it."""
    make = _cached_place.__wrapped__ if torch.compiler.is_compiling() else _cached_place
    return make(offset, classes, dtype, device)


class _Shards(NamedTuple):
    """What all processes know after the exchange."""

    parts: Tensor  # [processes, M+1, 9, N], the _ShardRows of every branch
    mass: Tensor  # [processes, N] sum_c u_c of the target's weights u on the shard
    owner: Tensor  # [N] the shard that holds the target (the largest of probabilities)
    offsets: Tensor  # [processes] number of the first class
    counts: Tensor  # [processes] number of classes
    weight_sum: Tensor  # [processes] sum of the class weights

    @property
    def total_classes(self) -> Tensor:
        return self.counts.sum()


class _Classes(NamedTuple):
    """Class indices as one shard sees them: quantities [N]; u is the target times its class weights."""

    position: Tensor  # [N, 1] place of the target, 0 where it is not here
    here: Tensor  # [N] bool
    weight: Tensor  # [N] the target's class weight, 0 where it is not here

    @classmethod
    def of(cls, target: Tensor, labelled: Tensor, offset: int, weights: Tensor) -> _Classes:
        position = target.long() - offset
        here = labelled & (position >= 0) & (position < weights.shape[0])
        position = torch.where(here, position, 0)
        return cls(position.unsqueeze(1), here, torch.where(here, weights[position], 0))

    def mass(self) -> Tensor:  # sum_c u_c
        return self.weight

    def tallest(self) -> Tensor:  # max_c t_c
        return self.here.to(self.weight.dtype)

    def is_at(self, position: Tensor) -> Tensor:
        return self.here & (position == self.position.squeeze(1))

    def aligned(self, shifted: Tensor) -> Tensor:  # sum_c u_c shifted_c
        return torch.where(self.weight != 0, shifted.gather(1, self.position).squeeze(1) * self.weight, 0)

    def expected(self, e: Tensor) -> Tensor:  # sum_c t_c e_c
        return torch.where(self.here, e.gather(1, self.position).squeeze(1), 0)

    def others(self, e: Tensor) -> Tensor:  # sum of e_c but the target's
        at_target = e.gather(1, self.position)
        return e.scatter(1, self.position, at_target.masked_fill(self.here.unsqueeze(1), 0)).sum(1)

    def minus_target(self, p: Tensor, others: Tensor) -> Tensor:
        """p - t. At the target that is minus the probability of the others: exact where p is nearly 1."""
        at_target = torch.where(self.here.unsqueeze(1), -others.unsqueeze(1), p.gather(1, self.position))
        return p.scatter(1, self.position, at_target)

    def subtract(self, g: Tensor, share: float) -> Tensor:  # g - share u
        return g.scatter_add(1, self.position, -share * self.weight.unsqueeze(1))


class _Probabilities(NamedTuple):
    """Class probabilities t [N, C/processes] as one shard sees them; methods as _Classes."""

    t: Tensor
    u: Tensor

    def mass(self) -> Tensor:
        return self.u.sum(1)

    def tallest(self) -> Tensor:
        return self.t.amax(1)

    def is_at(self, position: Tensor) -> Tensor:
        return position == self.t.argmax(1)

    def aligned(self, shifted: Tensor) -> Tensor:
        return torch.where(self.u != 0, shifted * self.u, 0).sum(1)

    def expected(self, e: Tensor) -> Tensor:
        return (self.t * e).sum(1)

    def others(self, e: Tensor) -> Tensor:
        return torch.zeros_like(self.mass())

    def subtract(self, g: Tensor, share: float) -> Tensor:
        return g - share * self.u


class _ShardRows(NamedTuple):
    """What one process knows of a branch, [N] each; logits less their largest here, ``top``."""

    top: Tensor
    partition: Tensor  # Z = sum exp(x - top)
    energy: Tensor  # E = sum exp(x - top) (x - top)
    aligned: Tensor  # sum u (x - top)
    smooth: Tensor  # sum w (x - top), for label smoothing
    confidence: Tensor  # sum t exp(x - top)
    others: Tensor  # sum exp(x - top) but the target's (0 for probabilities)
    hit: Tensor  # whether the first largest logit here is where the target is largest
    l1: Tensor  # sum |x|, for dependence "logit_l1"


def _local_rows(x: Tensor, target: _Classes | _Probabilities, weights: Tensor, options: Options) -> Tensor:
    """[N, C/processes] -> _ShardRows, stacked [9, N]."""
    top = x.amax(1)
    shifted = x - torch.where(top == -torch.inf, 0, top).unsqueeze(1)
    e = shifted.exp()
    zeros = torch.zeros_like(top)
    rows = _ShardRows(
        top,
        e.sum(1),
        torch.where(e > 0, e * shifted, 0).sum(1),
        target.aligned(shifted),
        torch.where(weights != 0, shifted * weights, 0).sum(1) if options.label_smoothing else zeros,
        target.expected(e),
        target.others(e),
        target.is_at(x.argmax(1)).to(x.dtype),
        x.abs().sum(1) if options.dependence == "logit_l1" else zeros,
    )
    return torch.stack(rows)


class _JoinedRows(NamedTuple):
    """A branch over all classes, [N] each."""

    top: Tensor  # max_c x_c
    log_partition: Tensor  # log sum_c exp(x_c - top)
    entropy: Tensor
    loss: Tensor  # -sum u log p
    smooth: Tensor  # -sum w log p
    confidence: Tensor
    others: Tensor  # the probability of all classes but the target
    correct: Tensor
    l1: Tensor


def _join(shards: _Shards, branch: int) -> _JoinedRows:
    rows = _ShardRows(*shards.parts[:, branch].unbind(1))  # [processes, N] each
    top = rows.top.amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    empty = rows.top == -torch.inf
    shift = torch.where(empty, 0, rows.top) - top  # what turns a shard's x - top into the joined one
    share = torch.where(empty, 0, shift.exp())
    partition = (rows.partition * share).sum(0)
    energy = (share * (rows.energy + rows.partition * shift)).sum(0)
    log_partition = partition.log()
    entropy = log_partition - energy / partition
    first = rows.top.argmax(0)  # ties: the first shard holds the first largest logit
    hit = rows.hit.gather(0, first.unsqueeze(0)).squeeze(0)
    mass, weight_sum = shards.mass, shards.weight_sum
    return _JoinedRows(
        top,
        log_partition,
        torch.where(entropy < 0, 0, entropy),  # below 0 by rounding only
        mass.sum(0) * log_partition - (rows.aligned + mass * shift).sum(0),
        weight_sum.sum() * log_partition - (rows.smooth + weight_sum.unsqueeze(1) * shift).sum(0),
        (rows.confidence * share).sum(0) / partition,
        (rows.others * share).sum(0) / partition,
        hit * (first == shards.owner).to(hit.dtype),
        rows.l1.sum(0),
    )


def _on_host(device: torch.device) -> bool:
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _check_layout(shards: _Shards, device: torch.device) -> Tensor:
    """0, or NaN (on a CPU an error) if the shards leave gaps, overlap or are not in the ranks' order."""
    offsets, counts = shards.offsets, shards.counts
    wrong = (offsets != counts.cumsum(0) - counts).any()
    if _on_host(device) and bool(wrong):
        held = ", ".join(f"[{a}, {a + n})" for a, n in zip(offsets.tolist(), counts.tolist(), strict=True))
        raise ValueError(
            f"offset: the processes hold the classes {held}, expected shards that follow each other in the "
            "order of the ranks; where they are not all of one size, pass offset= the number of this "
            "process's first class"
        )
    return torch.where(wrong, torch.nan, 0.0)


def _check_range(target: Tensor, labelled: Tensor, classes: Tensor, options: Options) -> Tensor:
    """[N] 0, or NaN (on a CPU an error) where a class index is out of range."""
    if _on_host(target.device):
        check_class_range(target, int(classes), options.ignore_index)
    return torch.where(labelled & ((target < 0) | (target >= classes)), torch.nan, 0.0)
