"""Experimental: one gamma per modality, from how good its branch is on held-out rows.

    python examples/gamma_by_modality.py [--seeds 6] [--rows FILE]

After every epoch gamma_m becomes (s_m / max_k s_k)^2, with s_m the mean true-class probability of branch m on
held-out rows, which is what the statistics call its dependence. A branch that is worth little out of sample
then gets a small unimodal loss, and memorises less. "Sum kept" scales these gammas so that they add up to M,
as with gamma = 1. The control trains with gamma = 1. Scikit-learn's digits, cut into views.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from fusion_guard import BUDGET, SETTINGS, net, split
from shared import arguments, write_rows
from torch import Tensor

from arl_fast import History
from arl_fast.ladder import Method, climb

HELD_OUT = 50
CONTROL = "gamma 1"


def by_confidence(history: History, keep_sum: bool = False) -> Tensor:
    """Weights of the losses [M+1]: 1 for the fused one, then the gammas."""
    s = history.series("dependence", "held_out")[-1]
    gamma = (s / s.max()) ** 2
    if keep_sum:
        gamma = gamma * len(s) / gamma.sum()
    return torch.cat([torch.ones(1), gamma])


CONSTANT = {"rule": "constant"}
RECIPES = {
    CONTROL: Method(CONSTANT),
    "by held-out confidence": Method(CONSTANT, weigh=by_confidence),
    "sum kept": Method(CONSTANT, weigh=partial(by_confidence, keep_sum=True)),
}


def main(arguments_given: Sequence[str] | None = None) -> None:
    options = arguments(__doc__, seeds=6).parse_args(arguments_given)
    torch.set_num_threads(1)
    for setting in SETTINGS:
        data = partial(split, setting, held_out=HELD_OUT)
        results = climb(partial(net, setting), data, BUDGET, options.seeds, RECIPES)
        line = f"{setting:26} {CONTROL}: {100 * results.values(CONTROL).mean():.1f}"
        for recipe in list(RECIPES)[1:]:
            gain = results.difference(recipe, CONTROL)
            line += f"; {recipe}: {100 * gain.mean:+.1f} ± {100 * gain.error:.1f}"
        print(line)
        if options.rows:
            write_rows(results, options.rows, setting=setting)


if __name__ == "__main__":
    main()
