"""Pictures of a training run (matplotlib, an optional dependency): shares, coefficients, accuracies.

Every function but ``overview`` draws into ``ax``, or into a new figure, and returns the axes. A history is a
list of BranchStats, one per step or epoch, or an ``arl_fast.History``; a list of histories, one per seed, is
drawn as mean and standard deviation.
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
    """A matplotlib style that light and dark pages show well; save figures with ``transparent=True``."""
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
    """Coefficients a by step, with the uniform 1/M as a dotted line; arguments as for ``shares``."""
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
        shown = [m for m in branches if m != "fused" or len(branches) != 2]
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


def overview(history: Any, title: str | None = None) -> Any:
    """One figure of a run: shares, coefficients, gains, losses, accuracies, where the rule is bound.

    Shares are lines, d solid against q dashed, between dotted lines for the smallest and the largest q that
    the entropy floor allows; of more than two modalities they are stacked areas, one panel for d and one for
    q. Grey areas show in which share of the steps the floor held and a coefficient was above 0.99. Fusion
    weights (``log_weights``) are drawn as shares of their sum. Held-out values are dashed lines with dots,
    one dot per epoch.

    Args:
        history: an ``arl_fast.History`` with at least one step.
        title: over the whole figure.

    Returns:
        The matplotlib figure.
    """
    plt = require_matplotlib()
    if len(history) == 0:
        raise ValueError("history: got no step to draw, expected at least one")
    names = history.modalities
    stacked = len(names) > 2
    rows = history.rows()
    with style():
        figure, axes = plt.subplots(
            2, 3 if stacked else 2, figsize=(15 if stacked else 11, 8), layout="constrained"
        )
        panels = list(axes[0]) + list(axes[1])
        if stacked:
            _stacked_shares(panels[0], history, rows, "dependence_share", "Dependence shares d")
            _stacked_shares(panels[1], history, rows, "inverse_variance", "Inverse-variance shares q")
            if not _weights(panels[5], history, names):
                panels[5].set_visible(False)
            panels[5].set(title="Fusion weights, shares of their sum", ylim=(0, 1))
            panels = panels[2:5]
        else:
            _line_shares(panels[0], history, rows)
            _weights(panels[0], history, names)
            panels = panels[1:]
        ax = panels[0]
        for m, name in enumerate(names):
            _curve(ax, rows, f"coefficient/{name}", COLOURS[m % len(COLOURS)], "-", f"{name}: coefficient a")
            _curve(ax, rows, f"gain/{name}", COLOURS[m % len(COLOURS)], "--", f"{name}: gain")
        _at_bound(ax, rows, "saturated", "steps with an a > 0.99")
        ax.set(title="Coefficients and gains", ylim=(0, None))
        held_out = history.rows("held_out")
        for ax, what, label in ((panels[1], "loss", "Losses, nats"), (panels[2], "accuracy", "Accuracies")):
            for m, name in enumerate(["fused", *names]):
                colour = INK if name == "fused" else COLOURS[(m - 1) % len(COLOURS)]
                _curve(ax, rows, f"{what}/{name}", colour, "-", name)
                if len(held_out["step"]):
                    ax.plot(
                        held_out["step"],
                        held_out[f"{what}/{name}"],
                        color=colour,
                        linestyle="--",
                        marker="o",
                        markersize=3,
                    )
            if len(held_out["step"]):
                ax.plot([], [], color=INK, linestyle="--", marker="o", markersize=3, label="held out")
            ax.set(title=label, ylim=(0, 1.02 if what == "accuracy" else None))
        for ax in figure.axes:
            ax.set_xlabel("step")
            if ax.get_legend_handles_labels()[0]:
                ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        if title:
            figure.suptitle(title, color=INK)
    return figure


def _curve(ax: Any, rows: Mapping[str, Tensor], name: str, colour: str, line: str, label: str) -> None:
    """One column by step, averaged over a fiftieth of the rows."""
    step, values = rows["step"], rows[name]
    window = max(1, len(values) // 50)
    if window > 1:
        values = torch.nn.functional.avg_pool1d(values[None], window, 1)[0]
        step = step[window - 1 :]
    ax.plot(step, values, color=colour, linestyle=line, label=label)


def _at_bound(ax: Any, rows: Mapping[str, Tensor], name: str, label: str) -> None:
    """A grey area as high as the share of steps that are at a bound; nothing where there was none."""
    if not bool(rows[name].any()):
        return
    window = max(1, len(rows[name]) // 50)
    share = torch.nn.functional.avg_pool1d(rows[name][None], window, 1)[0]
    ax.fill_between(rows["step"][window - 1 :], 0, share, color=INK, alpha=0.2, linewidth=0, label=label)


def _line_shares(ax: Any, history: Any, rows: Mapping[str, Tensor]) -> None:
    _at_bound(ax, rows, "floored", "steps at the entropy floor")
    for m, name in enumerate(history.modalities):
        _curve(ax, rows, f"dependence_share/{name}", COLOURS[m % len(COLOURS)], "-", f"{name}: d")
        _curve(ax, rows, f"inverse_variance/{name}", COLOURS[m % len(COLOURS)], "--", f"{name}: q")
    for bound in history.q_bounds():
        ax.axhline(bound, color=INK, linewidth=1, linestyle=":")
    ax.set(title="Shares of dependence d and inverse variance q", ylim=(0, 1))


def _stacked_shares(ax: Any, history: Any, rows: Mapping[str, Tensor], field: str, title: str) -> None:
    window = max(1, len(rows["step"]) // 50)
    shares = [
        torch.nn.functional.avg_pool1d(rows[f"{field}/{name}"][None], window, 1)[0]
        for name in history.modalities
    ]
    colours = [COLOURS[m % len(COLOURS)] for m in range(len(shares))]
    ax.stackplot(
        rows["step"][window - 1 :],
        *shares,
        labels=history.modalities,
        colors=colours,
        alpha=0.75,
        linewidth=0,
    )
    if field == "inverse_variance" and bool(rows["floored"].any()):
        at_floor = torch.nn.functional.avg_pool1d(rows["floored"][None], window, 1)[0]
        ax.plot(
            rows["step"][window - 1 :],
            at_floor,
            color="black",
            linewidth=1,
            linestyle=":",
            label="share of steps at the floor",
        )
    ax.set(title=title, ylim=(0, 1))


def _weights(ax: Any, history: Any, names: Sequence[str]) -> bool:
    """Fusion weights as shares of their sum; whether there were any."""
    rows = history.rows("weights")
    if not len(rows["step"]):
        return False
    weights = torch.stack([rows[f"weight/{name}"] for name in names])
    shares = weights / weights.sum(0)
    for m, name in enumerate(names):
        style = {"color": COLOURS[m % len(COLOURS)], "linestyle": "none", "marker": "D", "markersize": 5}
        ax.plot(rows["step"], shares[m], label=f"{name}: fusion weight", **style)
    return True


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
