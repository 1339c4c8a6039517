"""docs/security.md shows every attack and fault that a test tries."""

import pytest

from docs.attacks_table import PAGE, page_with_tables, rows


def test_the_page_is_up_to_date():
    assert page_with_tables() == PAGE.read_text(), "run: python -m docs.attacks_table"


@pytest.mark.parametrize("file", ["test_hostile.py", "test_hostile_files.py", "test_faults.py"])
def test_an_attack_is_named_once(file):
    attacks = [what for what, *_ in rows(file)]
    assert len(attacks) == len(set(attacks)) > 9
