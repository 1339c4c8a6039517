"""micronet-eval: what a compressed model really costs, by the rules of the MicroNet Challenge.

>>> import micronet_eval as mn
>>> report = mn.score(model, example_input, task="imagenet")   # any module
>>> report = mn.evaluate("submissions/3")                      # a submission's folder
>>> table = mn.compare(on="recipe.toml", pruners=["magnitude:ratio=0.5,0.7"])

Every command is a function: docs/python.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from micronet_eval.checking import check
    from micronet_eval.comparing import Comparison, compare
    from micronet_eval.diffing import diff
    from micronet_eval.errors import InputError, SubmissionError
    from micronet_eval.evaluation import Report, evaluate, score
    from micronet_eval.explaining import explain
    from micronet_eval.importing import import_weights
    from micronet_eval.new import new_plugin
    from micronet_eval.pages import write_comparison, write_pages
    from micronet_eval.plugins import registered
    from micronet_eval.policy_search import Search, search
    from micronet_eval.ranking import leaderboard
    from micronet_eval.recipe import compress, train_only
    from micronet_eval.reproducing import reproduce
    from micronet_eval.rules import RULES
    from micronet_eval.targets import count
    from micronet_eval.validating import validate

_ROOMS = {
    "checking": ("check",),
    "comparing": ("Comparison", "compare"),
    "diffing": ("diff",),
    "errors": ("InputError", "SubmissionError"),
    "evaluation": ("Report", "evaluate", "score"),
    "explaining": ("explain",),
    "importing": ("import_weights",),
    "new": ("new_plugin",),
    "pages": ("write_comparison", "write_pages"),
    "plugins": ("registered",),
    "policy_search": ("Search", "search"),
    "ranking": ("leaderboard",),
    "recipe": ("compress", "train_only"),
    "reproducing": ("reproduce",),
    "rules": ("RULES",),
    "targets": ("count",),
    "validating": ("validate",),
}


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for."""
    room = next((room for room, names in _ROOMS.items() if name in names), None)
    if room is None:
        raise AttributeError(f"module 'micronet_eval' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"micronet_eval.{room}"), name)


def __dir__() -> list[str]:
    """What a notebook completes: all names, imported already or not."""
    return sorted(__all__)


__all__ = [
    "RULES",
    "Comparison",
    "InputError",
    "Report",
    "Search",
    "SubmissionError",
    "check",
    "compare",
    "compress",
    "count",
    "diff",
    "evaluate",
    "explain",
    "import_weights",
    "leaderboard",
    "new_plugin",
    "registered",
    "reproduce",
    "score",
    "search",
    "train_only",
    "validate",
    "write_comparison",
    "write_pages",
]
