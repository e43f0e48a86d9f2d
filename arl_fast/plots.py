"""Pictures of a training run (matplotlib, an optional dependency): shares, coefficients, accuracies.

Every function draws into ``ax``, or into a new figure, and returns the axes. A history is what was collected with
``history.append(criterion.stats)``, one BranchStats per step or epoch; a list of histories, one per seed, is drawn as
mean and standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ._core.spec import BranchStats

History = Sequence[BranchStats] | Sequence[Sequence[BranchStats]]

# Readable on white and on black; the order is that of the modalities.
COLOURS = ("#2f81f7", "#d9730d", "#2da44e", "#bf3989", "#8250df", "#9a6700")
INK = "#7b7b7b"


def require_matplotlib() -> Any:
    """matplotlib.pyplot, or an ImportError that says how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            'arl_fast.plots needs matplotlib: pip install "arl_fast[plots]" or pip install matplotlib'
        ) from error
    return plt


def style() -> AbstractContextManager:
    """A matplotlib style that is readable on light and on dark pages, for figures saved with ``transparent=True``."""
    ink = {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    axes = {"axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK, "axes.titlesize": 11}
    lines = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    return require_matplotlib().rc_context(ink | axes | lines)


def shares(
    history: History,
    names: Sequence[str] | None = None,
    ax: Any = None,
    smooth: int | None = None,
    only: Sequence[str] | None = None,
) -> Any:
    """Dependence shares d (solid) against inverse-variance shares q (dashed), as in Fig. 3 of the paper.

    Args:
        history: BranchStats by step, or several such runs.
        names: the modalities' names, in order, for the legend.
        ax: axes to draw into; None: new ones.
        smooth: number of steps to average over; None: a fiftieth of the run.
        only: which modalities to draw; None: all. Of two the second is the mirror image of the first.
    """
    ax = _axes(ax)
    d, q = _series(history, "dependence_share", smooth), _series(history, "inverse_variance", smooth)
    for m, name in enumerate(_names(names, d)):
        if only is None or name in only:
            _band(ax, d[..., m], COLOURS[m % len(COLOURS)], "-", f"{name}: dependence d")
            _band(ax, q[..., m], COLOURS[m % len(COLOURS)], "--", f"{name}: inverse variance q")
    ax.axhline(1 / d.shape[-1], color=INK, linewidth=1, linestyle=":")
    ax.set(xlabel="step", ylabel="share")
    ax.legend()
    return ax


def coefficients(
    history: History, names: Sequence[str] | None = None, ax: Any = None, smooth: int | None = None
) -> Any:
    """Coefficients a by step, with the uniform 1/M as a dotted line; the arguments are those of ``shares``."""
    ax = _axes(ax)
    a = _series(history, "coefficients", smooth)
    ax.axhline(1 / a.shape[-1], color=INK, linewidth=1, linestyle=":")
    for m, name in enumerate(_names(names, a)):
        _band(ax, a[..., m], COLOURS[m % len(COLOURS)], "-", name)
    ax.set(xlabel="step", ylabel="coefficient")
    ax.legend()
    return ax


def accuracies(accuracy: Mapping[str, Mapping[str, Tensor]], ax: Any = None) -> Any:
    """One row per method, one colour per branch: a dot for every seed and a bar at the mean.

    Args:
        accuracy: method -> branch -> accuracies [seeds] in percent; the branch "fused" is drawn in grey.
        ax: axes to draw into; None: new ones.
    """
    ax = _axes(ax)
    modalities = list(dict.fromkeys(m for branches in accuracy.values() for m in branches if m != "fused"))
    colour = {"fused": INK} | {m: COLOURS[i % len(COLOURS)] for i, m in enumerate(modalities)}
    for name, c in colour.items():  # the legend, in a fixed order
        ax.plot([], [], color=c, linewidth=2.5, label="all together" if name == "fused" else f"{name} alone")
    for row, branches in enumerate(accuracy.values()):
        shown = [m for m in branches if m != "fused" or len(branches) > 2]
        for m in shown:
            values = torch.as_tensor(branches[m])
            y = torch.full_like(values, row)
            ax.scatter(values, y, s=18, color=colour[m], alpha=0.45, linewidths=0)
            ax.plot([values.mean()] * 2, [row - 0.3, row + 0.3], color=colour[m], linewidth=2.5)
    ax.set_yticks(range(len(accuracy)), list(accuracy))
    ax.invert_yaxis()
    ax.set_xlabel("test accuracy, %")
    ax.legend()
    return ax


def _axes(ax: Any) -> Any:
    return require_matplotlib().subplots(layout="constrained")[1] if ax is None else ax


def _names(names: Sequence[str] | None, series: Tensor) -> list[str]:
    modalities = series.shape[-1]
    if names is not None and len(names) != modalities:
        raise ValueError(f"names: got {list(names)}, expected {modalities}, one per modality")
    return [f"modality {m}" for m in range(modalities)] if names is None else list(names)


def _series(history: History, field: str, smooth: int | None) -> Tensor:
    """[runs, steps, M] of one field, smoothed by a moving average."""
    if len(history) == 0:
        raise ValueError("history: got nothing to draw, expected at least one BranchStats")
    runs = (
        [[history]]
        if isinstance(history, BranchStats)
        else [history]
        if isinstance(history[0], BranchStats)
        else history
    )
    values = torch.stack(
        [torch.stack([getattr(stats, field).float().cpu() for stats in run]) for run in runs]
    )  # type: ignore[union-attr]
    window = max(1, values.shape[1] // 50) if smooth is None else smooth
    if window > 1:
        total = torch.cat([torch.zeros_like(values[:, :1]), values.cumsum(1)], 1)
        values = (total[:, window:] - total[:, :-window]) / window
    return values


def _band(ax: Any, values: Tensor, colour: str, line: str, label: str) -> None:
    """Mean over runs [runs, steps] and, for several, the standard deviation as a band."""
    steps = torch.arange(values.shape[1])
    mean = values.mean(0)
    ax.plot(steps, mean, color=colour, linestyle=line, label=label)
    if values.shape[0] > 1:
        deviation = values.std(0)
        ax.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
