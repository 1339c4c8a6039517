"""Writes docs/strategies.md, a section for every bundled strategy: python -m docs.strategies_page."""

import inspect
import json
from pathlib import Path

from micronet_eval import plugins
from micronet_eval.strategy import values_of

PAGE = Path(__file__).parent / "strategies.md"
KINDS: tuple[tuple[plugins.Kind, str], ...] = (
    ("pruner", "Pruners remove structure: the model becomes smaller."),
    ("sparsifier", "Sparsifiers set weights to zero and hold them there by a mask."),
    ("quantizer", "Quantizers give weights and activations a number format."),
)


def page() -> str:
    """The whole page."""
    parts = [
        "# Strategies\n\nWritten by `docs/strategies_page.py` from the classes themselves; `micronet-eval strategies "
        "NAME` shows the same options.\nIn a [recipe](recipes.md) a strategy is a stage, with its options beside its "
        "name. All of them pass the checks of\n[plugins.md](plugins.md#what-every-strategy-must-hold).\n"
    ]
    for kind, says in KINDS:
        found = {n: e for n, e in plugins.registered(kind).items() if e.package.startswith("micronet-eval ")}
        parts.append(f"## {kind.capitalize()}s\n\n{says}\n")
        parts += [_section(kind, name, entry.thing) for name, entry in found.items()]
    return "\n".join(parts)


def _section(kind: str, name: str, strategy: type) -> str:
    lines = [f"### `{name}`", "", inspect.cleandoc(strategy.__doc__ or ""), ""]
    lines += ["```toml", "[[stages]]", f'{kind} = "{name}"']
    required = [(n, f) for n, f in strategy.model_fields.items() if f.is_required()]
    lines += [f"{n} = ...  # {f.description}" for n, f in required] + ["```", ""]
    lines += ["| option | values | default | meaning |", "|---|---|---|---|"]
    for option, field in strategy.model_fields.items():
        default = "required" if field.is_required() else _default(field.default)
        lines.append(f"| `{option}` | `{values_of(field.annotation)}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _default(value: object) -> str:
    """As a recipe has it."""
    return "none" if value is None else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page())
