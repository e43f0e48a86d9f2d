"""The ladder: the same model trained by one method after another, from joint training to ARL and its
controls.

    results = climb(factory, data, Budget(epochs=20, rates=(0.03, 0.1)), seeds=5, rows="rows.jsonl")
    print(results.table())

All methods of a seed start from the same initialisation and see the same batches, so that differences are
paired. The learning rate, and whatever else a method leaves open, is each method's best on validation data;
the test data are used once, at the end.
"""

from .batches import Batches
from .methods import TITLES, Method, methods
from .results import Difference, Results, difference, load_rows
from .training import Budget, Data, climb

__all__ = [
    "TITLES",
    "Batches",
    "Budget",
    "Data",
    "Difference",
    "Method",
    "Results",
    "climb",
    "difference",
    "load_rows",
    "methods",
]
