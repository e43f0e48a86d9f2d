"""Who is measured. Every contender is a function of (logits, target, link), the fused branch first.

It returns the loss and its statistics. The statistics that only arl_fast returns (accuracies, counts, losses
per branch, gains) are not asked of the others: they get by with what the method needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import arl_fast
from arl_fast import BranchLogits
from arl_fast.implementations import dispatch, reference

from .cases import GAMMA, TEMPERATURE, Case

Stats = dict[str, Tensor] | None
Loss = Callable[[Sequence[Tensor], Tensor, Tensor], tuple[Tensor, Stats]]


class Contender(NamedTuple):
    """A name, a function, and what the correctness gate and the measurement must know about it."""

    name: str
    loss: Loss
    ours: bool = False
    fused_only: bool = False  # its loss is the fused branch's alone
    in_place: bool = False  # writes gradients over the logits
    coarse: bool = False  # keeps intermediate values in the logits' dtype
    dependence: str = "confidence"
    floor: float | None = None


def _named(stats: arl_fast.BranchStats) -> Stats:
    return {"entropy": stats.entropy, "dependence": stats.dependence, "coefficients": stats.coefficients}


def wired(**options: Any) -> arl_fast.ARLLoss:
    """A criterion that has looked at its wiring, as in a first step: what is measured are leaves."""
    criterion = arl_fast.ARLLoss(**options)
    dispatch.override = None
    x, link = arl_fast.modulate([torch.randn(2, 2, requires_grad=True) for _ in range(2)])
    labels = criterion.options.task == "multilabel"
    criterion(
        BranchLogits(x[0] + x[1], x, link),
        torch.zeros(2, 2) if labels else torch.zeros(2, dtype=torch.int64),
    )
    return criterion


def ours(implementation: str, task: str = "multiclass") -> Contender:
    """ARLLoss as users call it, served by one implementation."""
    criterion = wired(gamma=GAMMA, temperature=TEMPERATURE, task=task)

    def loss(logits: Sequence[Tensor], target: Tensor, link: Tensor) -> tuple[Tensor, Stats]:
        dispatch.override = implementation
        value = criterion(BranchLogits(logits[0], logits[1:], link), target)
        return value, criterion

    return Contender(f"arl_fast {implementation}", loss, ours=True)


def statistics(outcome: Stats | arl_fast.ARLLoss) -> Stats:
    """Reading arl_fast's statistics is for the gate only: a training step leaves them on the device."""
    return _named(outcome.stats) if isinstance(outcome, arl_fast.ARLLoss) else outcome


def _shares(entropy: Tensor, dependence: Tensor) -> Tensor:
    q = 1 / (entropy / entropy.sum()).clamp_min(0.6 / entropy.shape[0])
    return torch.softmax(TEMPERATURE / 2 * (q / q.sum() - dependence / dependence.sum()), 0)


def eager_stacked(logits: Sequence[Tensor], target: Tensor, link: Tensor) -> tuple[Tensor, Stats]:
    """All branches in one tensor: fewest calls, one extra copy. About 25 operations forward."""
    x = torch.stack(tuple(logits))
    branches, batch, classes = x.shape
    logp = torch.log_softmax(x, 2, dtype=torch.float32)
    rows = (
        F.nll_loss(logp.view(-1, classes), target.repeat(branches), reduction="none")
        .view(branches, batch)
        .mean(1)
    )
    weights = torch.full((branches,), GAMMA, device=x.device)
    weights[0] = 1.0
    loss = rows.dot(weights)
    with torch.no_grad():
        own = logp[1:]
        p = own.exp()
        entropy = (p * own).sum(2).mean(1).neg()
        dependence = p.gather(2, target.expand(branches - 1, batch).unsqueeze(2)).mean((1, 2))
        a = _shares(entropy, dependence)
    return loss, {"entropy": entropy, "dependence": dependence, "coefficients": a}


def eager_split(logits: Sequence[Tensor], target: Tensor, link: Tensor) -> tuple[Tensor, Stats]:
    """One branch at a time: no copy, log p shared between the loss and the statistics."""
    logps = [torch.log_softmax(x, 1, dtype=torch.float32) for x in logits]
    losses = [F.nll_loss(logp, target) for logp in logps]
    loss = losses[0]
    for own in losses[1:]:
        loss = loss + GAMMA * own
    with torch.no_grad():
        entropies, dependences = [], []
        for logp in logps[1:]:
            p = logp.exp()
            dependences.append(p.gather(1, target.unsqueeze(1)).mean())
            entropies.append(p.mul_(logp).sum() / -target.numel())
        entropy, dependence = torch.stack(entropies), torch.stack(dependences)
        a = _shares(entropy, dependence)
    return loss, {"entropy": entropy, "dependence": dependence, "coefficients": a}


def eager_for_compiler(logits: Sequence[Tensor], target: Tensor, link: Tensor) -> tuple[Tensor, Stats]:
    """eager_split without the in-place product: nothing keeps the compiler from fusing."""
    logps = [torch.log_softmax(x.float(), 1) for x in logits]
    loss = F.nll_loss(logps[0], target)
    for logp in logps[1:]:
        loss = loss + GAMMA * F.nll_loss(logp, target)
    own = [logp.detach() for logp in logps[1:]]
    entropy = torch.stack([-(logp.exp() * logp).sum(1).mean() for logp in own])
    dependence = torch.stack([logp.gather(1, target.unsqueeze(1)).exp().mean() for logp in own])
    return loss, {"entropy": entropy, "dependence": dependence, "coefficients": _shares(entropy, dependence)}


def eager_labels(logits: Sequence[Tensor], target: Tensor, link: Tensor) -> tuple[Tensor, Stats]:
    """task="multilabel", one branch at a time."""
    loss, _ = plain(logits, target, link)
    with torch.no_grad():
        entropies, dependences = [], []
        for x in logits[1:]:
            x = x.float()
            p, q = torch.sigmoid(x), torch.sigmoid(-x)
            dependences.append(torch.lerp(q, p, target).mean())
            entropies.append((torch.special.entr(p) + torch.special.entr(q)).mean())
        entropy, dependence = torch.stack(entropies), torch.stack(dependences)
        a = _shares(entropy, dependence)
    return loss, {"entropy": entropy, "dependence": dependence, "coefficients": a}


def eager(case: Case) -> Contender:
    """Vectorised torch without a synchronisation, in the form that is faster at this size."""
    if case.task == "multilabel":
        return Contender("eager ARL", eager_labels, coarse=True)
    return Contender("eager ARL", eager_stacked if case.elements <= 1 << 17 else eager_split)


def release(logits: Sequence[Tensor], target: Tensor, link: Tensor) -> tuple[Tensor, Stats]:
    """The release's formula and its seven reads by the host: four for the shares, three for the log.

    Two modalities, the sum of absolute logits as dependence, shares of the entropy not below 0.3; with the
    coefficients assigned, as the release intends. Written from the formulas in docs/errata.md.
    """
    fused, audio, visual = logits
    losses = [F.cross_entropy(x, target) for x in (fused, audio, visual)]
    entropies, dependences = [], []
    for x in (audio, visual):
        p = torch.softmax(x, 1)
        dependences.append(x.detach().abs().mean(0).cpu().numpy())
        entropies.append(-(p * torch.log(p + 1e-16)).sum(1).mean().detach().cpu().numpy())
    d = [float(v.sum()) for v in dependences]
    h = [max(float(v) / float(sum(entropies)), 0.3) for v in entropies]
    q = [(1 / v) / (1 / h[0] + 1 / h[1]) for v in h]
    d = [v / sum(d) for v in d]
    # T d_v q_a against T d_a q_v: softmax of two numbers
    a = torch.softmax(torch.tensor([TEMPERATURE * d[1] * q[0], TEMPERATURE * d[0] * q[1]]), 0)
    logged = [v.item() for v in losses]
    del logged
    dependence = torch.tensor([float(v.sum()) for v in dependences])
    entropy = torch.tensor([float(v) for v in entropies])
    stats = {"entropy": entropy, "dependence": dependence, "coefficients": a}
    return losses[0] + GAMMA * (losses[1] + losses[2]), stats


def _cross_entropy(x: Tensor, target: Tensor) -> Tensor:
    """torch's own: of labels, which are of floating point, the binary one."""
    if target.is_floating_point():
        return F.binary_cross_entropy_with_logits(x, target)
    return F.cross_entropy(x, target)


def unit(logits: Sequence[Tensor], target: Tensor, link: Tensor) -> tuple[Tensor, Stats]:
    """One cross-entropy of the fused logits: what a training step pays without ARL, and the unit of every
    ratio.
    """
    return _cross_entropy(logits[0], target), None


def plain(logits: Sequence[Tensor], target: Tensor, link: Tensor) -> tuple[Tensor, Stats]:
    """M+1 torch cross-entropies, no statistics."""
    loss = _cross_entropy(logits[0], target)
    for x in logits[1:]:
        loss = loss + GAMMA * _cross_entropy(x, target)
    return loss, None


def by_reference(logits: Sequence[Tensor], target: Tensor, link: Tensor) -> tuple[Tensor, Stats]:
    value, stats = arl_fast.arl_loss(
        logits[0],
        list(logits[1:]),
        target,
        link=link,
        gamma=GAMMA,
        temperature=TEMPERATURE,
        implementation=reference,
    )
    return value, _named(stats)


def _compiled(name: str, loss: Loss) -> Contender:
    return Contender(name, torch.compile(loss, fullgraph=True, dynamic=False))


def _called_per_branch(name: str, loss: Callable[[Tensor, Tensor], Tensor], in_place: bool) -> Contender:
    def total(logits: Sequence[Tensor], target: Tensor, link: Tensor) -> tuple[Tensor, Stats]:
        value = loss(logits[0], target)
        for x in logits[1:]:
            value = value + GAMMA * loss(x, target)
        return value, None

    return Contender(name, total, in_place=in_place, coarse=in_place)


@functools.cache
def packages() -> tuple[list[Contender], list[str]]:
    """Cross-entropies of other packages, called once per branch, and why the missing ones are missing (GPU
    only).
    """
    found, missing = [], []
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        found.append(_called_per_branch("Liger CE x (M+1)", liger_cross_entropy, in_place=True))
    except Exception as error:  # an incompatible package fails in any way it likes
        missing.append(f"Liger: {type(error).__name__}: {error}")
    try:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        found.append(
            _called_per_branch(
                "flash-attn CE x (M+1)", lambda x, y: cross_entropy_loss(x, y)[0].mean(), in_place=False
            )
        )
    except Exception as error:
        missing.append(f"flash-attn: {type(error).__name__}: {error}")
    return found, missing


# half a minute of compiling each
COMPILED_SHAPES = {
    (64, 6),
    (64, 309),
    (2048, 1000),
    (1024, 32000),
    (8192, 32000),
}


def contenders(case: Case, device: str, compile: bool = True, only_compiled: bool = False) -> list[Contender]:
    """Everybody who can run this case on this type of device; the unit first."""
    names = [n for n in dispatch.MODULES if dispatch.load(n, device)[0] is not None]
    served = [ours(n, case.task) for n in names]
    everyone = [Contender("torch CE, fused only", unit, fused_only=True, coarse=True), *served, eager(case)]
    if case.suite.startswith("scaling"):
        best = dispatch.choose(device)[0]
        return [everyone[0], ours(best), everyone[-1]]
    everyone.append(Contender("torch CE x (M+1)", plain, coarse=True))
    if case.task == "multilabel":
        return everyone
    if case.modalities == 2 and case.dtype == "float32":
        everyone.append(Contender("release", release, dependence="logit_l1", floor=0.3))
    if (
        compile
        and case.modalities == 2
        and case.dtype == "float32"
        and (case.batch, case.classes) in COMPILED_SHAPES
    ):
        everyone.append(_compiled("compiled eager ARL", eager_for_compiler))
        everyone.append(_compiled("compiled reference", by_reference))
    if only_compiled:
        return [everyone[0], *(c for c in everyone if c.name.startswith("compiled"))]
    return everyone + (packages()[0] if device == "cuda" else [])
