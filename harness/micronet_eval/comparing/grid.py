"""What is compared: a grid of strategies on one trained network, recipes, submissions; each cell and seed is a job."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from micronet_eval import plugins
from micronet_eval.comparing.jobs import Job
from micronet_eval.errors import InputError, printable
from micronet_eval.isolation import AUTO, Isolation
from micronet_eval.recipe import Recipe, configured, named_stages
from micronet_eval.strategy import Quantizer
from micronet_eval.submission import bounded, checked, read_table, told_apart
from micronet_eval.training import Training

Cell = tuple[tuple[plugins.Kind, str, Mapping[str, Any]], ...]
"""What is applied one after the other: kind, name, options of each strategy."""


def parse(kind: plugins.Kind, text: str) -> list[Cell]:
    """`name:option=value,value,option=value` as every combination of the values, each a cell of one strategy.

    Raises InputError where there is no such strategy or option, or where options are out of range.
    """
    name, _, rest = text.partition(":")
    strategy = plugins.lookup(kind, name)
    values = _values(f"{kind} {name}", rest, strategy.model_fields)
    found = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    for given in found:  # told before anything is trained
        configured(kind, name, given, f"--{kind} {text}")
    return [((kind, name, given),) for given in found]


def options(text: str, what: str = "--fine-tune", known: Iterable[str] | None = None) -> dict[str, Any]:
    """`epochs=2,learning_rate=0.001` as a table. Raises InputError where an option is not `known`, or has no value."""
    values = _values(what, text, known)
    if several := [option for option, found in values.items() if len(found) > 1]:
        raise InputError(f"{what} {text!r}: {several[0]!r} has several values; give one")
    return {option: found[0] for option, found in values.items()}


def _values(what: str, text: str, known: Iterable[str] | None) -> dict[str, list[Any]]:
    """The values of each option; one without a name before it belongs to the option before."""
    values: dict[str, list[Any]] = {}
    option = ""
    for item in filter(None, _items(text)):
        before, equals, after = item.partition("=")
        if equals and not _OPENS.search(before):
            option = before.strip().replace("-", "_")
            if known is not None and option not in known:
                raise InputError(f"{what}: {plugins.unknown('option', option, known)}")
        elif not option:
            raise InputError(f"{what} {text!r}: {item!r} has no value; write options like option=value,option=value")
        else:
            after = item
        values.setdefault(option, []).append(_value(after))
    return values


_OPENS = re.compile(r'["\[{]')
_QUOTED = r'"(?:\\.|[^"\\])*"'
_UNDERSCORES = re.compile(rf"({_QUOTED})|(?<=\d)_(?=\d)")


def _items(text: str) -> Iterator[str]:
    """What stands between the commas, but for those in brackets and in quotes."""
    item, depth = "", 0
    for part in re.findall(rf"{_QUOTED}|.", text, re.DOTALL):
        if part == "," and depth <= 0:
            yield item
            item = ""
            continue
        depth += (part in "[{") - (part in "]}")
        item += part
    yield item


def _value(text: str) -> Any:
    """A number that a recipe may have, true, false, a list, a table as JSON has it, or else the text itself."""
    try:
        found = json.loads(
            _UNDERSCORES.sub(lambda match: match[1] or "", text),  # TOML's, as in 10_000
            parse_int=lambda digits: int(bounded(digits)),
            parse_float=lambda digits: float(bounded(digits)),
        )
    except (ValueError, RecursionError):
        return text.strip()
    return text.strip() if found is None else found  # recipes have no null


def grid(alternatives: Sequence[Sequence[Cell]]) -> list[Cell]:
    """Every combination of one cell out of each group: the groups are kinds, their cells alternatives."""
    groups = [group for group in alternatives if group]
    return [tuple(itertools.chain.from_iterable(chosen)) for chosen in itertools.product(*groups)] if groups else []


def title(cell: Cell) -> str:
    """How a cell is called: `magnitude:ratio=0.5 + fixed-point:weight_bits=4`."""
    parts = []
    for _, name, options in cell:
        told = ",".join(f"{option}={_written(value)}" for option, value in options.items())
        parts.append(f"{name}:{told}" if told else name)
    return " + ".join(parts)


def _written(value: object) -> str:
    """A value as `parse` reads it."""
    plain = isinstance(value, str) and _values("", f"option={value}", None) == {"option": [value]}
    return str(value) if plain else json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def jobs_of(
    cells: Sequence[Cell], base: Path, seeds: int, fine_tune: Mapping[str, Any] | None, data: Path | None, kept: Path
) -> list[Job]:
    """A job for each cell and seed, on the network that the recipe `base` trains.

    Behind each strategy comes `fine_tune`, the options of a training stage; quantizers come behind merged batch norm,
    unless they want it as it is. Raises InputError where the recipe or the options of training are wrong, and where the
    recipe quantizes what is to be pruned or quantized.
    """
    found: list[Job] = []
    recipe = read_table(base)
    given = named_stages(checked(recipe, Recipe, base).stages)
    quantized = next((place for place, stage in given if stage.quantizer is not None), "")
    if fine_tune:
        checked(fine_tune, Training, "--fine-tune")
    stages = recipe.get("stages", [])
    for cell, seed in itertools.product(cells, range(seeds)):
        more: list[dict[str, Any]] = []
        for kind, name, options in cell:
            strategy = configured(kind, name, options, f"{kind} {name}")
            if quantized and not (isinstance(strategy, Quantizer) and strategy.goes_behind_another):
                raise InputError(f"--on {base} quantizes already ({quantized}); give a recipe that only trains")
            if isinstance(strategy, Quantizer) and not strategy.wants_batch_norm:
                more.append({"merge": "batch-norm"})
            more += [{kind: name, **options}] + ([{"train": dict(fine_tune)}] if fine_tune else [])
        seeded = _seeded(recipe, seed)
        seeded["submission"] = {"name": title(cell), "authors": ["micronet-eval compare"]}
        found.append(
            Job(
                name=title(cell),
                seed=seed,
                recipe=tomli_w.dumps({**seeded, "stages": [*stages, *more]}),
                base=tomli_w.dumps({**seeded, "submission": {"name": "base", "authors": ["micronet-eval"]}}),
                data=None if data is None else str(data),
                kept=str(kept),
            )
        )
    return found


def jobs_at(path: Path, seeds: int, data: Path | None, isolation: Isolation = AUTO) -> list[Job]:
    """A job for each seed of a recipe, or one for a submission's folder. Raises InputError where it is neither."""
    root = None if data is None else str(data)
    if path.is_dir():
        return [Job(name=printable(path.resolve().name), folder=str(path), data=root, isolation=isolation)]
    try:
        recipe = read_table(path)
    except InputError as error:
        raise InputError(f"{path} is no submission's folder and no recipe: {error}") from error
    name = printable(path.stem if path.stem != "recipe" else path.resolve().parent.name)
    return [Job(name, seed, tomli_w.dumps(_seeded(recipe, seed)), data=root) for seed in range(seeds)]


def jobs_in(
    paths: Sequence[Path], seeds: int, data: Path | None, isolation: Isolation = AUTO, taken: Set[str] = frozenset()
) -> list[Job]:
    """Those of several paths, as `jobs_at`. What would have the name of another, or one taken, has its path for it."""
    found = {path: jobs_at(path, seeds, data, isolation) for path in paths}
    names = told_apart([jobs[0].name for jobs in found.values()], list(found), taken)
    return [
        replace(job, name=printable(name)) for name, jobs in zip(names, found.values(), strict=True) for job in jobs
    ]


def _seeded(recipe: Mapping[str, Any], seed: int) -> dict[str, Any]:
    first = recipe.get("seed", 0)
    return {**recipe, "seed": first + seed if isinstance(first, int) else first}
