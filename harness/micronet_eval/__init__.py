"""micronet-eval: what a compressed model really costs, by the rules of the MicroNet Challenge.

>>> import micronet_eval
>>> report = micronet_eval.score(model, example_input, task="imagenet")   # any module
>>> report = micronet_eval.evaluate("submissions/3")                      # a submission's folder
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from micronet_eval.evaluation import Report, evaluate, score

_FROM = {
    "evaluate": "micronet_eval.evaluation",
    "score": "micronet_eval.evaluation",
    "Report": "micronet_eval.evaluation",
}


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for."""
    if name not in _FROM:
        raise AttributeError(f"module 'micronet_eval' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_FROM[name]), name)


__all__ = ["Report", "evaluate", "score"]
