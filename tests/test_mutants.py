"""The list of known bugs fits the code: each is found where it says, is valid Python, and names tests that exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant, place


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_each_fits_the_code(mutant: Mutant) -> None:
    ast.parse(place(mutant, ROOT))
    assert (ROOT / mutant.tests[0]).is_file()


def test_names_are_told_apart() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_an_entry_that_the_code_has_left_behind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for old, times in (("y", 0), ("x = 1", 2)):
        with pytest.raises(LookupError, match=f"stands {times} times in a.py"):
            place(Mutant("a bug", "a.py", old, "z", ("t.py",)), tmp_path)
