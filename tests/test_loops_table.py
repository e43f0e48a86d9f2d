"""docs/loops.md names tests and examples: they must exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_what_the_table_names_exists():
    text = (ROOT / "docs" / "loops.md").read_text()
    file, seen = "", 0
    for module, first, other, check in re.findall(
        r"(test_\w+\.py)(?:::(\w+))?|::(\w+)|\[(check_\w+)\]", text
    ):
        file = module or file
        source = (ROOT / "tests" / ("distributed_checks.py" if check else file)).read_text()
        name = check or first or other
        assert not name or f"def {name}(" in source, f"{file}::{name}"
        seen += 1
    assert seen > 50
    for example in re.findall(r"examples/\w+\.py", text):
        assert (ROOT / example).exists(), example
