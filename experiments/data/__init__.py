"""One module per data set, with ``check(folder, config)`` and ``load(folder, config, seed, cache)``."""

from __future__ import annotations

import importlib
from typing import Any

READERS = {
    "crema-d": "crema_d",
    "ave": "ave",
    "ks": "kinetics_sounds",
    "mosi": "mosi",
    "ucf101": "ucf101",
    "av-digits": "av_digits",
    "omniglot": "omniglot",
    "mfeat": "mfeat",
}


def reader(dataset: str) -> Any:
    """The module that reads a data set; imported when needed, with the libraries it needs."""
    return importlib.import_module(f".{READERS[dataset]}", __name__)
