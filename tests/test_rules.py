"""Every rule has an id, code, and a test that is marked with it; docs/scoring.md has the table of all three."""

import json
from pkgutil import resolve_name

import pytest

from docs.rules_table import PAGE, marked_tests, page_with_table
from micronet_eval.opening import open_submission
from micronet_eval.rules import RULES, evidence_on

IDS = [rule.id for rule in RULES]
TESTS = marked_tests()


def test_every_rule_is_there_once():
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_a_rule_has_code_and_a_test(rule):
    for name in rule.code:
        assert resolve_name(f"micronet_eval.{name}") is not None
    assert TESTS.get(rule.id)


def test_no_test_is_marked_with_an_unknown_rule():
    assert set(TESTS) <= set(IDS)


def test_the_table_of_the_page_is_up_to_date():
    assert PAGE.read_text() == page_with_table(), "run: python -m docs.rules_table"


def test_what_a_submission_exercises(submission):
    evidence = evidence_on(open_submission(submission))
    exercised = {rule.id for rule in RULES if rule.exercised and rule.exercised(evidence)}
    always = {"score.sum", "storage.bits", "math.dot-product", "width.accumulate", "op.free"}
    assert always <= exercised
    assert not exercised & {"math.unknown", "width.codebook", "storage.permutation", "math.recurrent", "op.gelu"}


def test_the_command(run, submission):
    code, out, _ = run("rules", "--format", "json")
    assert code == 0
    assert [row["id"] for row in json.loads(out)] == IDS
    code, out, _ = run("rules", str(submission), "--format", "json")
    rows = {row["id"]: row["exercised by"] for row in json.loads(out)}
    assert code == 0
    assert rows["score.sum"] == submission.name
    assert rows["math.unknown"] == ""
