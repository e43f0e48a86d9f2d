"""The methods that are compared: ARL, what it consists of, and its controls.

A method is one entry of METHODS. To add one, add an entry: what differs is which modalities it sees, the
options of its ARLLoss, and whether it needs a head or a way of predicting of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import arl_fast

from .config import Config


@dataclass(frozen=True)
class Method:
    """One rung of the ladder.

    Attributes:
        title: for tables.
        loss: from (config, steps of warm-up, statistics over all processes) to the loss.
        alone: the only modality it sees; None: all.
        auxiliary: whether the unimodal logits come from a head of their own.
        late: trains nothing, but adds the logits of the models of each modality alone.
    """

    title: str
    loss: Callable[[Config, int, bool], nn.Module]
    alone: str | None = None
    auxiliary: bool = False
    late: bool = False


def _rule(rule: str, **changes: Any) -> Callable[[Config, int, bool], nn.Module]:
    def loss(config: Config, warmup: int, sync: bool) -> nn.Module:
        options: dict[str, Any] = dict(gamma=config.gamma, temperature=config.temperature, gain=config.gain)
        return arl_fast.ARLLoss(rule=rule, warmup=warmup, sync_stats=sync, **(options | changes))

    return loss


def _reversed(config: Config, warmup: int, sync: bool) -> nn.Module:
    return _rule("share", temperature=-config.temperature)(config, warmup, sync)


class SimpleMMLLoss(nn.Module):
    """The rule of "Fusion or Confusion?" (arXiv 2512.22991, TillmannRheude/simple_mml_baseline, 9eb533f).

    a = softmax(T q / d) with q_m = mean over rows of 1 / (H + 1e-8) and d_m = sum over classes of mean
    |logit|, both of the auxiliary head's logits. The encoders' gradients are multiplied by 1 + a_m, as
    theirs are after backward. A single row with H = 0 makes q_m about 1e8 / B, and with it a one-hot of
    a. Statistics are each process's own.
    """

    def __init__(self, gamma: float, temperature: float) -> None:
        super().__init__()
        self.gamma, self.temperature = gamma, temperature
        self.stats: arl_fast.BranchStats | None = None

    def coefficients(self, unimodal: list[Tensor]) -> Tensor:
        ratios = []
        for x in unimodal:
            logp = torch.log_softmax(x.detach().float(), 1)
            entropy = -(logp.exp() * logp).sum(1)
            q = (1 / (entropy + 1e-8)).mean()
            ratios.append(q / (x.detach().float().abs().mean(0).sum() + 1e-8))
        return torch.softmax(self.temperature * torch.stack(ratios), 0)

    def forward(self, output: arl_fast.BranchLogits, target: Tensor) -> Tensor:
        a = self.coefficients(list(output.unimodal.values()))  # type: ignore[union-attr]
        loss, self.stats = arl_fast.arl_loss(
            output.fused, output.unimodal, target, link=output.link, gamma=self.gamma, rule=lambda stats: a
        )
        return loss


def _simple_mml(config: Config, warmup: int, sync: bool) -> nn.Module:
    if warmup:
        raise ValueError("arl-simple-mml: got warmup_epochs > 0, expected 0; this method has no warm-up")
    return SimpleMMLLoss(config.gamma, config.temperature)


_plain = _rule("none", gamma=0.0)  # torch's cross-entropy of the fused logits, bit for bit

_SHARED: dict[str, Method] = {
    "late": Method("trained apart, logits added", _plain, late=True),
    "joint": Method("joint cross-entropy", _plain),
    "unimodal": Method("+ unimodal losses", _rule("none")),
    "constant": Method("+ constant gain", _rule("constant")),
    "arl": Method("ARL (share rule)", _rule("share")),
    "arl-paper": Method("ARL (the paper's Eq. 18)", _rule("paper")),
    "arl-reversed": Method("ARL with its sign reversed", _reversed),
    "unimodal-auxiliary": Method("+ unimodal losses, separate head", _rule("none"), auxiliary=True),
    "arl-simple-mml": Method("ARL of simple_mml_baseline", _simple_mml, auxiliary=True),
}


def methods(modalities: list[str]) -> dict[str, Method]:
    """Name -> method, for these modalities: each alone, then those that see all."""
    alone = {f"alone:{name}": Method(f"{name} alone", _plain, alone=name) for name in modalities}
    shared = {name: m for name, m in _SHARED.items() if name != "arl-paper" or len(modalities) == 2}
    return alone | shared


def select(asked: list[str], modalities: list[str], config: Config) -> dict[str, Method]:
    """The methods asked for, in the ladder's order; "ladder" is all that fit, "alone" each modality alone.

    "late" brings the modalities alone with it, which it adds up.
    """
    auxiliary_fits = config.fusion != "transformer" and not config.warmup_epochs
    known = methods(modalities)
    names: set[str] = set()
    for name in asked:
        alones = {key for key in known if key.startswith("alone:")}
        if name == "ladder":
            names |= {key for key, method in known.items() if auxiliary_fits or not method.auxiliary}
        elif name == "alone":
            names |= alones
        elif name in known:
            names |= {name} | (alones if known[name].late else set())
        else:
            raise ValueError(f"method: got {name!r}, expected ladder, alone, {', '.join(known)}")
    return {name: method for name, method in known.items() if name in names}
