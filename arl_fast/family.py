"""Other methods of the family, from their published formulas and the statistics of ARL's loss.

OGM, without the noise of OGM-GE:

    criterion = ARLLoss(gamma=0.0, rule="ogm", temperature=0.1)

DGL:

    head, criterion = DGL(ConcatHead(...)), ARLLoss(rule="none")

Gradient-Blending, after every epoch of a run that is tracked and evaluated:

    weights = gradient_blending_of(history)
    blended_loss(output, target, weights).backward()

In ``arl_fast.ladder`` they are the methods "ogm", "dgl" and "blending". docs/family.md tells what each adds
to a step, and where it departs from its paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._core.branches import as_branch_logits
from ._core.spec import BranchStats
from .heads import ZeroedHead
from .history import History


@dataclass(frozen=True)
class Fixed:
    """A rule for ``gain="plain"`` that multiplies each encoder's gradient by a number which does not change.

    Under SGD without weight decay that is a learning rate of its own for each encoder, without naming
    parameters.
    """

    gains: tuple[float, ...]

    def __call__(self, stats: BranchStats) -> Tensor:
        return torch.tensor(self.gains, dtype=stats.entropy.dtype).to(stats.entropy.device, non_blocking=True)


class DGL(nn.Module):
    """A head with the routing of disentangled gradient learning (DGL; Wei, Luo and Luo, ICCV 2025).

    The fused loss trains the head and no encoder, the unimodal losses train the encoders and not the head:
    fused logits come from detached features, unimodal logits through detached parameters. Use it with
    ``ARLLoss(gamma, rule="none")``, whose gamma is the paper's alpha.

    While gradients are recorded the head is called twice; otherwise once, as if it were not wrapped. The
    logits are those of ``head(features)``, and the link is the head's own, so that a rule can scale what
    reaches the encoders.

    Args:
        head: a module from features to BranchLogits, or a tuple or dict of that form: the heads of this
            package. All parameters that it uses must be its own.

    Raises:
        TypeError: a ZeroedHead around a callable that is no module.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        if isinstance(head, ZeroedHead) and not isinstance(head.fusion, nn.Module):
            raise TypeError(
                f"head: got a ZeroedHead around a {type(head.fusion).__name__}, whose parameters are not the "
                "head's, so that they cannot be detached: pass an nn.Module as its fusion"
            )
        self.head = head

    def forward(
        self, features: Mapping[str, Tensor | None] | Sequence[Tensor | None], *args: Any, **kwargs: Any
    ) -> Any:
        if not torch.is_grad_enabled():
            return self.head(features, *args, **kwargs)
        fused = as_branch_logits(self.head(_detached(features), *args, **kwargs)).fused
        state = {name: p.detach() for name, p in self.head.named_parameters()}
        # copies, so that running statistics are updated once, not twice
        state |= {name: b.clone() for name, b in self.head.named_buffers()}
        output = torch.func.functional_call(self.head, state, (features, *args), kwargs)
        if isinstance(output, Mapping):  # it may have a mask
            return {**output, "fused": fused}
        return as_branch_logits(output)._replace(fused=fused)


def _detached(features: Any) -> Any:
    """The features without their graph: a tensor, None, or several of them in containers."""
    if isinstance(features, Mapping):
        return {name: _detached(z) for name, z in features.items()}
    if isinstance(features, (list, tuple)):
        return [_detached(z) for z in features]
    return None if features is None else features.detach()


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

    The branches are those of one model, trained together, and a training loss is the mean over its epoch: an
    online variant, cheaper and rougher than a model for each branch.

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
