"""Tables and figures from rows: python -m experiments.table ROWS.jsonl ... [--branches] [--figure FILE.svg]

One table per data set and configuration, in Markdown: mean ± standard deviation over seeds, and the
difference to another method, taken seed by seed, ± its standard error. Of several learning rates, the one
with the best mean validation accuracy counts, for each method its own; test data takes no part in the choice.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from . import rows
from .methods import methods

Row = dict[str, Any]
Chosen = dict[str, dict[int, Row]]  # method -> seed -> row


def grouped(all_rows: list[Row]) -> dict[str, list[Row]]:
    """Title of a data set with its changes -> rows."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in all_rows:
        changes = ", ".join(f"{name} = {value}" for name, value in row["changes"].items())
        groups[f"{row['dataset']} ({changes})" if changes else row["dataset"]].append(row)
    return dict(groups)


def modalities(group: list[Row]) -> list[str]:
    """Those of the rows that see the most: a row of one modality alone names only its own."""
    most: list[str] = []
    for row in group:
        most = max(
            most,
            [name for name in row["test"] if name not in ("fused", "weighted")],
            key=lambda names: len(names),
        )
    return most


def choose(group: list[Row]) -> Chosen:
    """Each method's rows at the rate that is best on validation data, among those with the most seeds."""
    by_rate: dict[str, dict[float, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in group:
        by_rate[row["method"]][row["rate"]][row["seed"]] = row
    order = list(methods(modalities(group)))
    chosen = {}
    for name in sorted(by_rate, key=lambda name: order.index(name) if name in order else len(order)):
        rates = by_rate[name].values()
        chosen[name] = max(
            rates, key=lambda runs: (len(runs), mean(_validation(row) for row in runs.values()))
        )
    return chosen


def _validation(row: Row) -> float:
    return row["validation"]["fused"]["accuracy"]


def over_seeds(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def paired(ours: dict[int, Row], theirs: dict[int, Row]) -> str:
    """Mean difference of test accuracy over the seeds that both have, ± its standard error."""
    both = sorted(set(ours) & set(theirs))
    if not both:
        return ""
    delta = [ours[s]["test"]["fused"]["accuracy"] - theirs[s]["test"]["fused"]["accuracy"] for s in both]
    return (
        f"{mean(delta):+.1f} ± {stdev(delta) / len(delta) ** 0.5:.1f}"
        if len(delta) > 1
        else f"{delta[0]:+.1f}"
    )


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def results(chosen: Chosen, names: list[str], versus: str) -> str:
    """Accuracy, difference, macro F1, each modality of the same model alone, and with fusion weights."""
    titles = methods(names)
    weights = any("weighted" in row["test"] for runs in chosen.values() for row in runs.values())
    lines = []
    for name, runs in chosen.items():
        alone = name.startswith("alone:")
        test = [row["test"] for row in runs.values()]
        line = [titles[name].title if name in titles else name]
        line.append(over_seeds([t["fused"]["accuracy"] for t in test]))
        line.append(paired(runs, chosen[versus]) if versus in chosen and name != versus else "")
        line.append(over_seeds([t["fused"]["macro_f1"] for t in test]))
        for m in names:
            line.append("" if alone or m not in test[0] else over_seeds([t[m]["accuracy"] for t in test]))
        rate = next(iter(runs.values()))["rate"]
        if weights:
            seen = [t["weighted"]["accuracy"] for t in test if "weighted" in t]
            line.append(over_seeds(seen) if len(seen) == len(test) else "")
        lines.append([*line, f"{rate:g}", str(len(runs))])
    against = titles[versus].title if versus in titles else versus
    header = [
        "test, %",
        "accuracy",
        f"minus {against}",
        "macro F1",
        *(f"its {m} alone" for m in names),
        *(["with fusion weights"] if weights else []),
        "rate",
        "seeds",
    ]
    return markdown(header, lines)


def branches(chosen: Chosen, names: list[str]) -> str:
    """What every prediction knows and claims: accuracy in training and test, confidence, cross-entropy."""
    titles = methods(names)
    lines = []
    for name, runs in chosen.items():
        first = next(iter(runs.values()))
        shown = (
            ["fused"] if name.startswith("alone:") else ["fused", *(m for m in names if m in first["test"])]
        )
        for branch in shown:
            train = [r["train_accuracy"][branch] for r in runs.values() if "train_accuracy" in r]
            test = [r["test"][branch] for r in runs.values()]
            lines.append(
                [
                    titles[name].title if name in titles else name,
                    branch,
                    over_seeds(train) if train else "",
                    over_seeds([t["accuracy"] for t in test]),
                    over_seeds([t["confidence"] for t in test]),
                    f"{mean(t['cross_entropy'] for t in test):.2f}",
                ]
            )
    return markdown(
        [
            "method",
            "prediction",
            "training accuracy",
            "test accuracy",
            "test confidence",
            "test cross-entropy",
        ],
        lines,
    )


def figure(groups: dict[str, Chosen], out: Path) -> None:
    """Test accuracy of every seed and the mean, method by method, one panel per data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from arl_fast import plots

    with plots.style(), plt.rc_context({"svg.fonttype": "none"}):  # text as text: a third of the size
        height = 0.6 + 0.34 * max(len(chosen) for chosen in groups.values())
        drawn, axes = plt.subplots(
            1, len(groups), figsize=(5.2 * len(groups), height), layout="constrained", squeeze=False
        )
        for ax, (title, chosen) in zip(axes[0], groups.items(), strict=True):
            titles = methods(modalities([row for runs in chosen.values() for row in runs.values()]))
            for place, runs in enumerate(chosen.values()):
                values = [row["test"]["fused"]["accuracy"] for row in runs.values()]
                ax.plot(values, [place] * len(values), "o", alpha=0.5, color="C0", markersize=5)
                ax.plot([mean(values)], [place], "|", color="0.45", markersize=14, markeredgewidth=2)
            ax.set_yticks(range(len(chosen)), [titles[n].title if n in titles else n for n in chosen])
            ax.invert_yaxis()
            ax.set_xlabel("test accuracy, %")
            ax.set_title(title)
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(out, dpi=150, transparent=True)
        plt.close(drawn)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument(
        "--versus", default="joint", help="the method that differences are taken to (default joint)"
    )
    parser.add_argument(
        "--branches",
        action="store_true",
        help="what each branch knows and claims, in the place of the results",
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the results as well")
    options = parser.parse_args(argv)
    for path in options.rows:
        if not path.is_file():
            parser.error(f"{path}: no such file")
    groups = grouped(rows.read(*options.rows))
    if not groups:
        parser.error("no rows in " + ", ".join(map(str, options.rows)))
    chosen = {title: choose(group) for title, group in groups.items()}
    for title, group in groups.items():
        names = modalities(group)
        body = (
            branches(chosen[title], names)
            if options.branches
            else results(chosen[title], names, options.versus)
        )
        print(f"### {title}\n\n{body}\n")
    if options.figure:
        figure(chosen, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
