"""What the rungs of the ladder are: options of ARLLoss, and what is chosen on validation data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._core.spec import BranchStats
from ..family import DGL, Fixed, gradient_blending_of
from ..history import History

TITLES = {
    "alone": "{} alone",
    "late": "late fusion",
    "joint": "joint cross-entropy",
    "unimodal": "+ unimodal losses",
    "weights": "+ fusion weights",
    "constant": "+ constant gain",
    "share": "ARL (share rule)",
    "share_weights": "ARL, fusion weights",
    "paper": "paper rule (Eq. 18)",
    "paper_swapped": "paper rule, other order",
    "reversed": "share rule, reversed",
    "rates": "own learning rates",
    "ogm": "OGM",
    "dgl": "DGL",
    "blending": "Gradient-Blending",
}

FAMILY = ("ogm", "dgl", "blending")  # other people's methods, which are trained only where they are named

# rungs that come twice where there are validation data: the same models, with weights on their predictions
WEIGHTED = {"unimodal": "weights", "share": "share_weights"}


class Method(NamedTuple):
    """One rung.

    Attributes:
        options: of ARLLoss. "gains", instead of "rule" and "gain", are fixed factors on the encoders'
            gradients.
        variants: further options, of which the one that is best on validation data counts.
        head: from the model's head to the module that takes its place in training, such as ``family.DGL``.
        weigh: asked after every epoch, with the statistics of its steps and of the validation data in the
            history: weights [M+1] of the branches' losses from then on, the fused one's first and above 0.
            None: as before, at first 1 for the fused loss and gamma for the others.
    """

    options: dict[str, Any]
    variants: tuple[dict[str, Any], ...] = ({},)
    head: Callable[[nn.Module], nn.Module] | None = None
    weigh: Callable[[History], Tensor | None] | None = None


def methods(modalities: Sequence[str]) -> dict[str, Method]:
    """All rungs for these modalities, by the keys of TITLES, without those that come with others.

    "late": a model per modality, trained apart on its own branch, their logits added; with "alone", each.
    "joint": the cross-entropy of the fused logits.
    "unimodal": and of each modality's. With "weights", FusionWeights of validation data.
    "constant": and the gain 1 + 1/M for every encoder.
    "share": ARL. With "share_weights", FusionWeights of validation data.
    "paper", "paper_swapped": Eq. 18, the modalities in the given and in the other order; for two only.
    "reversed": the share rule with the sign of T changed.
    "rates": unimodal losses, one encoder's gradient times 2 or a half, or none's. Under SGD without weight
        decay that is a learning rate of its own for that encoder. Adam cancels it.

    And other people's, docs/family.md:
    "ogm": "joint", with the gains of OGM, alpha = 0.1.
    "dgl": "unimodal", with DGL's routing: it wraps the model's head.
    "blending": "unimodal", with the losses weighted by Gradient-Blending from the second epoch on. Its
        validation losses come from the validation data.
    """
    count = len(modalities)
    tilts = [[1.0] * count] + [
        [factor if n == m else 1.0 for n in range(count)] for m in range(count) for factor in (0.5, 2.0)
    ]
    rungs = {
        "late": Method(dict(gamma=0.0, rule="none")),
        "joint": Method(dict(gamma=0.0, rule="none")),
        "unimodal": Method(dict(rule="none")),
        "constant": Method(dict(rule="constant")),
        "share": Method(dict(rule="share")),
        "reversed": Method(dict(rule="share", temperature=-8.0)),
        "rates": Method({}, tuple({"gains": tilt} for tilt in tilts)),
        "ogm": Method(dict(gamma=0.0, rule="ogm", temperature=0.1, gain="plain")),
        "dgl": Method(dict(rule="none"), head=DGL),
        "blending": Method(dict(rule="none"), weigh=blending),
    }
    if count == 2:
        rungs |= {"paper": Method(dict(rule="paper")), "paper_swapped": Method(dict(rule=paper_swapped))}
    return {name: rungs[name] for name in TITLES if name in rungs}


def loss_options(method: Method, variant: dict[str, Any]) -> dict[str, Any]:
    """Options of ARLLoss for a method in one of its variants."""
    options = {**method.options, **variant}
    gains = options.pop("gains", None)
    return options if gains is None else options | {"rule": Fixed(tuple(gains)), "gain": "plain"}


def blending(history: History) -> Tensor | None:
    """M+1 times the weights of Gradient-Blending between the first epoch and the last one: [M+1].

    Equal weights are then those of "unimodal", and learning rates can be compared. The fused loss keeps a
    weight of at least 0.01 of all.
    """
    if history.epoch < 2:
        return None
    weights = gradient_blending_of(history)
    weights[0].clamp_(min=0.01)
    return len(weights) * weights / weights.sum()


def paper_swapped(stats: BranchStats, temperature: float = 8.0) -> Tensor:
    """Eq. 18 with modality 1 in the place of modality 0: a = softmax(T [d1/d0, q1/q0]), q1/q0 = H0/H1."""
    tiny = torch.finfo(stats.entropy.dtype).tiny
    entropy, dependence = stats.entropy.clamp_min(tiny), stats.dependence.clamp_min(tiny)
    ratios = torch.stack([dependence[1] / dependence[0], entropy[0] / entropy[1]]).clamp_max(1e30)
    return torch.softmax(temperature * ratios, 0)
