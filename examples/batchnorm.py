"""BatchNorm in a fusion under ZeroedHead: whose running statistics? python examples/batchnorm.py [--seeds 8]

The demo's data (handwritten digits, two halves) and encoders, and a fusion with a norm in it. The unimodal
passes of training normalise by their own batch; what they do to the running statistics decides what
evaluation sees.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from demo import BUDGET, HALVES, WIDTH, split
from demo import net as demo_net
from shared import Net
from torch import nn

import arl_fast
from arl_fast.ladder import Data, Results, climb

KINDS = {
    "LayerNorm": (nn.LayerNorm, {}),
    "BatchNorm, statistics of the fused pass (default)": (nn.BatchNorm1d, {}),
    "BatchNorm, statistics of all passes (track_unimodal=True)": (nn.BatchNorm1d, {"track_unimodal": True}),
}


class Fusion(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), norm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))

    def forward(self, z):
        return self.layers(torch.cat(list(z.values()), 1))


def net(norm, options) -> Net:
    """The demo's model with this fusion in the place of its head."""
    model = demo_net()
    model.head = arl_fast.ZeroedHead(Fusion(norm), **options)
    return model


def data(seed: int) -> Data:
    return split(seed)._replace(validation=None)  # nothing is chosen


def main(seeds: int = 8) -> dict[str, Results]:
    torch.set_num_threads(1)
    results = {}
    print("| norm in the fusion | together | left alone | right alone |\n|---|---|---|---|")
    for name, kind in KINDS.items():
        results[name] = climb(partial(net, *kind), data, BUDGET, seeds, ["share"], progress=False)
        values = [100 * results[name].values("share", branch) for branch in ("fused", *HALVES)]
        cells = [f"{v.mean():.1f}" + (f" ± {v.std():.1f}" if seeds > 1 else "") for v in values]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    main(parser.parse_args().seeds)
