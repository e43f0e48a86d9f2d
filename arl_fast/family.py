"""Other methods of the family, from their published formulas and the statistics that the loss computes.

    criterion = ARLLoss(gamma=0.0, rule=OGM(alpha=0.1), gain="plain")  # OGM, without the noise of OGM-GE

    criterion(dgl(head, features), target).backward()  # DGL, with criterion = ARLLoss(rule="none")

    weights = gradient_blending(train_0, held_out_0, train_1, held_out_1)  # Gradient-Blending
    blended_loss(output, target, weights).backward()

docs/family.md tells what each adds to a step, and where it departs from its paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._core.branches import BranchLogits, as_branch_logits
from ._core.spec import BranchStats
from .history import History


@dataclass(frozen=True)
class OGM:
    """The rule of OGM (Peng et al., CVPR 2022): ``ARLLoss(gamma=0.0, rule=OGM(alpha), gain="plain")``.

    With s_m the mean true-class probability of modality m, which is what the dependence "confidence" is:

        rho_m = s_m / (mean of the other modalities' s),  k_m = 1 - tanh(alpha rho_m) if rho_m > 1, else 1,

    and k_m multiplies the gradient that reaches encoder m. For two modalities this is the paper's ratio; the
    mean over the others is an extension of ours. OGM's branches have a part of the bias each:
    ``ConcatHead(..., bias="split")``. OGM-GE's noise is not added.

    Args:
        alpha: > 0, how strongly the modality that is ahead is held back.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha: got {self.alpha!r}, expected a number > 0")

    def __call__(self, stats: BranchStats) -> Tensor:
        """Gains [M]: 1 for the weaker modalities, less for one that is ahead; for a modality alone 1."""
        s = stats.dependence
        present = stats.count[1:] > 0  # an absent modality's statistics are 0
        others = (present.sum() - present.to(s.dtype)).clamp_min(1)
        mean = (s.sum() - s) / others
        ratio = s / mean.clamp_min(torch.finfo(s.dtype).tiny)
        ahead = (ratio > 1) & (mean > 0)
        return torch.where(ahead, 1 - torch.tanh(self.alpha * ratio), torch.ones_like(s))


@dataclass(frozen=True)
class Fixed:
    """A rule for ``gain="plain"`` that multiplies each encoder's gradient by a number which does not change.

    Under SGD without weight decay that is a learning rate of its own for each encoder, without naming
    parameters.
    """

    gains: tuple[float, ...]

    def __call__(self, stats: BranchStats) -> Tensor:
        return torch.tensor(self.gains, dtype=stats.entropy.dtype).to(stats.entropy.device, non_blocking=True)


def dgl(head: nn.Module, features: Mapping[str, Tensor] | list[Tensor]) -> BranchLogits:
    """The routing of disentangled gradient learning (DGL; Wei, Luo and Luo, ICCV 2025).

    The fused loss trains the head and no encoder, the unimodal losses train the encoders and not the head:
        fused logits
    from detached features, unimodal logits through detached parameters. Use the result with ``ARLLoss(gamma,
    rule="none")``, whose gamma is the paper's alpha. The head is called twice.

    Args:
        head: a module from features to BranchLogits, or a tuple or dict of that form: the heads of this
            package.
        features: of the encoders, as the head takes them.

    Returns:
        BranchLogits without a link; the logits are those of ``head(features)``.
    """
    named = isinstance(features, Mapping)
    detached = {m: z.detach() for m, z in features.items()} if named else [z.detach() for z in features]  # type: ignore[union-attr]
    fused = as_branch_logits(head(detached)).fused
    state = {name: p.detach() for name, p in head.named_parameters()}
    state |= {
        name: b.clone() for name, b in head.named_buffers()
    }  # running statistics are updated once, not twice
    unimodal = as_branch_logits(torch.func.functional_call(head, state, (features,))).unimodal
    return BranchLogits(fused, unimodal)


def gradient_blending(
    train_before: Tensor,
    held_out_before: Tensor,
    train_after: Tensor,
    held_out_after: Tensor,
    floor: float = 0.01,
) -> Tensor:
    """Weights of Gradient-Blending, by overfitting and generalisation (Wang et al., CVPR 2020).

    Between two checkpoints branch k has gained G_k = held_out_before - held_out_after and has overfitted by
    the growth of its gap, O_k = (held_out_after - train_after) - (held_out_before - train_before). The
    weights are

        w_k = (G_k / O_k^2) / sum_j (G_j / O_j^2).

    The paper leaves open what to do without a gain or without overfitting. Here a branch whose held-out loss
    did not fall gets 0, |O_k| is at least ``floor``, and if no branch has gained, all weights are equal.

    Args:
        train_before, held_out_before, train_after, held_out_after: [M+1] mean losses, in nats, of the fused
            branch and each modality's. In the paper each comes from a model trained on that branch alone.
        floor: smallest |O_k|, in nats.

    Returns:
        [M+1] weights >= 0, which sum to 1, the fused branch's first. ``gammas`` turns them into factors of
        unimodal losses.
    """
    losses = {"train_before": train_before, "held_out_before": held_out_before}
    losses |= {"train_after": train_after, "held_out_after": held_out_after}
    shape = torch.as_tensor(train_before).shape
    for name, loss in losses.items():
        loss = torch.as_tensor(loss)
        if loss.dim() != 1 or len(loss) < 2 or loss.shape != shape:
            raise ValueError(
                f"{name}: got shape {list(loss.shape)}, expected [M+1] losses, as many as train_before has"
            )
    if not floor > 0:
        raise ValueError(f"floor: got {floor!r}, expected a number > 0")
    t0, h0, t1, h1 = (torch.as_tensor(loss).detach() for loss in losses.values())
    gained = (h0 - h1).clamp_min(0)
    overfitted = ((h1 - t1) - (h0 - t0)).abs().clamp_min(floor)
    ratio = gained / overfitted.square()
    total = ratio.sum()
    return torch.where(total > 0, ratio / total.clamp_min(torch.finfo(ratio.dtype).tiny), 1 / len(ratio))


def gradient_blending_of(history: History, before: int = 0, after: int = -1, floor: float = 0.01) -> Tensor:
    """``gradient_blending`` between two epochs of a history with evaluations: [M+1], on the host.

    The branches are those of one model, trained together, and a training loss is the mean over its epoch: the
        online variant,
    cheaper and rougher than a model for each branch.

    Raises:
        ValueError: fewer than two epochs with an evaluation each.
    """
    train, held_out = (history.series("loss", kind) for kind in ("epochs", "held_out"))
    if len(train) < 2 or len(train) != len(held_out):
        raise ValueError(
            f"history: got {len(train)} epochs and {len(held_out)} evaluations, expected at least 2 and one "
            "evaluation per epoch"
        )
    return gradient_blending(train[before], held_out[before], train[after], held_out[after], floor)


def gammas(weights: Tensor) -> Tensor:
    """Weights [M+1] as ARLLoss's gamma, one per modality [M], relative to a fused loss of weight 1.

    Raises:
        ValueError: the fused branch has weight 0; ``blended_loss`` takes such weights.
    """
    if not float(weights[0]) > 0:
        raise ValueError(
            "weights: got 0 for the fused branch, to which gammas are relative: use blended_loss instead"
        )
    return weights[1:] / weights[0]


def blended_loss(
    output: Any, target: Tensor, weights: Tensor, loss: Callable[..., Tensor] = F.cross_entropy
) -> Tensor:
    """sum_k w_k CE(x_k, y) over the fused branch and the modalities'; no gains, so that a link is not used.

    Args:
        output: what ``ARLLoss`` takes.
        target: as for ``loss``.
        weights: [M+1], the fused branch's first.
        loss: of logits and target; torch's cross-entropy.
    """
    fused, unimodal, _ = as_branch_logits(output)
    logits = [fused, *(unimodal.values() if isinstance(unimodal, Mapping) else unimodal)]
    if weights.shape != (len(logits),):
        raise ValueError(
            f"weights: got shape {list(weights.shape)}, expected [{len(logits)}], the fused branch's first"
        )
    total = torch.stack([loss(x, target) for x in logits])
    return (weights.to(total) * total).sum()
