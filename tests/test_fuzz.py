"""A seeded portion of what benchmarks/fuzz.py runs for long, and what it has found."""

import pytest

from benchmarks import fuzz

INPUTS = {"packed": 120, "strategy": 40}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_inputs_are_refused_or_mean_what_they_say(name):
    assert fuzz.random_bytes(name, INPUTS.get(name, 400), seed=2) == {}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_the_input_that_is_damaged_is_valid(name, monkeypatch):
    """Else all inputs would be refused for the same reason, and nothing would be tried."""
    for module in (fuzz, fuzz.packing):
        monkeypatch.setattr(module, "InputError", ZeroDivisionError)
    monkeypatch.setattr(fuzz, "StructureError", ZeroDivisionError)
    monkeypatch.setattr(fuzz, "suppress", lambda kind: pytest.MonkeyPatch.context())
    fuzz.TARGETS[name](b"")


@pytest.mark.parametrize("data", ["05b68aa27a2821b3da", "00cd0122", "aa889ee304f831a97e1a71478eab100e24a74bd4bf"])
def test_a_strategy_that_is_accepted_has_a_recipe_that_is(data):
    """Found: numbers that a recipe may not have (9...9, 1e+41) were told of only when the recipe was read.

    And an exponent that is too large even for Decimal was a traceback.
    """
    fuzz.TARGETS["strategy"](bytes.fromhex(data))


def found(text):
    """A target that crashes on an input that has a text in it."""

    def target(data):
        if text in data:
            raise KeyError("crash")

    return target


def test_a_crash_and_a_hang_are_found(monkeypatch):
    monkeypatch.setitem(fuzz.TARGETS, "crashing", found(b"\x07"))
    (told,) = fuzz.random_bytes("crashing", 400).values()
    assert told.startswith("KeyError at test_fuzz.py")
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    assert fuzz.tried(lambda data: [None for _ in iter(int, 1)], b"").startswith("_Slow")


def test_hypothesis_shrinks_what_it_finds(monkeypatch):
    monkeypatch.setitem(fuzz.TARGETS, "crashing", found(b"\x07"))
    (told,) = fuzz.with_hypothesis("crashing", 2_000).values()
    assert told.endswith(" <- 07")
