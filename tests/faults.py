"""Which test proves what the system does in which fault: read from the marks, written into docs/faults.md.

python tests/faults.py          # rewrites the last column of the table
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "faults.md"
FAULTS = range(1, 41)


def marked() -> dict[int, list[str]]:
    """Number of a fault -> tests marked with it, as `folder/file::test`, sorted."""
    found: dict[int, set[str]] = defaultdict(set)
    for path in TESTS.rglob("test_*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        everywhere = [
            number
            for statement in module.body
            if isinstance(statement, ast.Assign) and any(ast.unparse(t) == "pytestmark" for t in statement.targets)
            for number in _numbers(statement.value)
        ]
        for function in (node for node in module.body if isinstance(node, ast.FunctionDef)):
            if not function.name.startswith("test_"):
                continue
            name = f"{path.relative_to(TESTS).with_suffix('')}::{function.name}"
            for number in (*everywhere, *(n for decorator in function.decorator_list for n in _numbers(decorator))):
                found[number].add(name)
    return {number: sorted(names) for number, names in sorted(found.items())}


def _numbers(node: ast.AST) -> list[int]:
    """Arguments of every `pytest.mark.fault(...)` in an expression."""
    calls = (call for call in ast.walk(node) if isinstance(call, ast.Call))
    return [
        argument.value
        for call in calls
        if ast.unparse(call.func) == "pytest.mark.fault"
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int)
    ]


def rows(page: str) -> dict[int, list[str]]:
    """Number of a fault -> the cells of its row."""
    cells = (
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in page.splitlines() if line.startswith("| ")
    )
    return {int(row[0]): row for row in cells if row[0].isdigit()}


def cell(tests: list[str]) -> str:
    """The last cell of a row."""
    return "<br>".join(f"`{name}`" for name in tests)


def written(page: str, tests: Mapping[int, list[str]]) -> str:
    """The page with the last column as the marks have it."""
    lines = []
    for line in page.splitlines():
        start = line.strip("| ").split(" | ")
        if line.startswith("| ") and start[0].isdigit():
            line = "| " + " | ".join([*start[:3], cell(tests.get(int(start[0]), []))]) + " |"
        lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), marked()), encoding="utf-8")
