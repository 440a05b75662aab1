"""Every fault of docs/faults.md has a test, and the page names exactly the tests that are marked."""

from __future__ import annotations

import pytest
from faults import FAULTS, PAGE, cell, marked, rows

MARKED = marked()
ROWS = rows(PAGE.read_text(encoding="utf-8"))


def test_every_fault_has_a_row_and_no_other_has() -> None:
    assert list(ROWS) == list(FAULTS)
    assert set(MARKED) <= set(FAULTS)


@pytest.mark.parametrize("number", FAULTS)
def test_a_fault_has_a_test_and_its_row_names_it(number: int) -> None:
    tests = MARKED.get(number, [])
    assert tests, f"no test is marked fault({number})"
    assert ROWS[number][3] == cell(tests), "run `python tests/faults.py`"
