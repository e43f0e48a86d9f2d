"""``python -m arl_fast.diagnose module:task [--epochs 5] [--seeds 3] [--rates 0.03 0.1] [--out diagnosis]``

``task`` is a function without arguments that returns a dict of ``diagnose``'s arguments, of which it needs
"model_or_factory", "train_loader" and "val_loader".
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from . import diagnose

REQUIRED = ("model_or_factory", "train_loader", "val_loader")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m arl_fast.diagnose",
        description="Train your own model in a few ways, in short paired runs, and say whether it needs ARL.",
        epilog=f"task() returns a dict of arguments of arl_fast.diagnose; it needs {', '.join(REQUIRED)}.",
    )
    parser.add_argument("task", help="module:function, found from the current folder")
    parser.add_argument("--epochs", type=int, help="of every run (default 5)")
    parser.add_argument("--seeds", type=int, help="number of seeds (default 3)")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="learning rates to choose from (default 0.03 0.1)"
    )
    parser.add_argument("--device", help="where to train (default cpu)")
    parser.add_argument(
        "--out", default="diagnosis", help="folder for the page, the JSON and the rows (default diagnosis)"
    )
    options = parser.parse_args(arguments)
    module, _, function = options.task.partition(":")
    if not function:
        parser.error(f"task: got {options.task!r}, expected module:function")
    sys.path.insert(0, os.getcwd())
    settings = getattr(importlib.import_module(module), function)()
    missing = [name for name in REQUIRED if not isinstance(settings, dict) or name not in settings]
    if missing:
        parser.error(f"task: {options.task} did not return a dict with {', '.join(missing)}")
    given = {name: value for name, value in vars(options).items() if name != "task" and value is not None}
    settings = settings | given
    print(diagnose(**settings))
    print(f"\nPage: {os.path.join(settings['out'], 'diagnosis.html')}")


if __name__ == "__main__":
    main()
