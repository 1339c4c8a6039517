"""Named, versioned sets of rules: which formulas they change, and nothing else. Every report names the one it used.

The rules of the challenge say that a transcendental function counts as one operation; the counter that came with them
charges 2 multiplications and 1 addition for a sigmoid, and 3 and 1 for a swish. Entries were verified by the counter,
so its table is the default. By the text a sigmoid is 1, and what is a product with a sigmoid is 1 more. All other
formulas charge 1 for each transcendental function in them already (the erf of GELU, the exp of a softmax), or have
none (hard sigmoid and hard swish), and are the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from micronet_eval.costs import Formula, elementwise
from micronet_eval.errors import InputError


@dataclass(frozen=True)
class Ruleset:
    """A name, one line on what it stands for, and the formulas that it has in the place of the default's."""

    name: str
    description: str
    overrides: Mapping[str, Formula] = field(default_factory=dict)


DEFAULT = "micronet-2019"

RULESETS: Mapping[str, Ruleset] = {
    ruleset.name: ruleset
    for ruleset in (
        Ruleset(DEFAULT, "the challenge's reference counter: sigmoid 2 + 1, swish 3 + 1"),
        Ruleset(
            "micronet-2019-text",
            "the challenge's text: a transcendental function counts 1",
            {
                "aten.sigmoid": elementwise(1),
                "aten.silu": elementwise(2),  # x times sigmoid(x)
                "aten.glu": elementwise(2),  # one half times sigmoid of the other
            },
        ),
    )
}


def ruleset(name: str) -> Ruleset:
    """The ruleset of that name. Raises InputError that lists the known ones."""
    if name not in RULESETS:
        raise InputError(f"unknown ruleset {name!r}; known: {', '.join(RULESETS)}")
    return RULESETS[name]
