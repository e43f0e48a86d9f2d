"""The layout holds: no import circle, no layer that reaches up, no private name of another module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each may import what stands before it, and its own folder.
LAYERS = ("arl_fast._core", "arl_fast.implementations", "arl_fast._autograd")


def modules(folder: str) -> dict[str, Path]:
    names = {}
    for path in (ROOT / folder).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, path: Path, known: set[str]) -> list[tuple[str, str | None]]:
    """(module, name taken from it) of every import of a module of ours, lazy imports included."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names if alias.name in known]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                if alias.name == "_C":  # the extension, which imports nothing of ours
                    continue
                submodule = f"{module}.{alias.name}"
                if submodule in known:
                    found.append((submodule, None))
                elif module in known:
                    found.append((module, alias.name))
    return found


def graph(folder: str) -> dict[str, list[tuple[str, str | None]]]:
    paths = modules(folder)
    return {name: imports(name, path, set(paths)) for name, path in paths.items()}


@pytest.mark.parametrize("folder", ["arl_fast", "benchmarks", "examples"])
def test_no_import_circle(folder):
    edges = {name: {to for to, _ in found} for name, found in graph(folder).items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for to in edges[name]:
                visit(to, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_layers_import_downwards():
    def level(name: str) -> int:
        return next((i for i, layer in enumerate(LAYERS) if name.startswith(layer)), len(LAYERS))

    wrong = [
        f"{name} imports {to}"
        for name, found in graph("arl_fast").items()
        for to, _ in found
        if level(to) > level(name)
    ]
    assert not wrong


def test_nobody_imports_private_names():
    wrong = [
        f"{name} imports {taken} of {to}"
        for folder in ("arl_fast", "benchmarks")
        for name, found in graph(folder).items()
        for to, taken in found
        if taken is not None and taken.startswith("_") and not taken.startswith("__")
    ]
    assert not wrong


def test_private_names_of_torch_stand_in_one_file():
    wrong = []
    for name, path in modules("arl_fast").items():
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            private = any(part.startswith("_") and not part.startswith("__") for part in text.split(".")[1:])
            if text.startswith("torch.") and private and name != "arl_fast._core._torch":
                wrong.append(f"{name}: {text}")
    assert not wrong
