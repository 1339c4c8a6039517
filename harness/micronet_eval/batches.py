"""Whether a model does for a batch what it does for one example: what is traced has to be what is measured.

A graph may compute with the size of its batch. One that multiplies by `weight[:, : (batch - 1) * 8]` costs nothing
where one example is traced, and has all its weights where a hundred are measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

import torch
from torch import Tensor, nn

from micronet_eval.errors import InputError
from micronet_eval.graph import values_in
from micronet_eval.trace import Op, Trace, Value, trace


def check_batches(model: nn.Module, shape: tuple[int, ...], recorded: Trace, sizes: Iterable[int]) -> None:
    """Traces batches of `sizes` examples of a shape beside `recorded`, the trace of one example.

    Each operation has to be the same, with the same constants and numbers, value for value, and with results that are
    as large, or larger by just the size of the batch. Raises InputError where one is not.
    """
    for size in sizes:
        batched = trace(model, torch.zeros(size, *shape))
        for one, many in zip_longest(recorded.ops, batched.ops):
            if one is None or many is None or not _alike(one, many, size):
                op = one or many
                raise InputError(
                    f"the model does something else for {size} examples at once than for one, first in module "
                    f"{op.module!r}: {op.name}; what is counted has to be what is measured"
                )


def check_apart(model: nn.Module, inputs: Tensor, outputs: Tensor, draws: torch.Generator) -> None:
    """Runs each half of a batch among other examples: the `outputs` have to be the same, bit for bit.

    They are computed in the same order whatever the others are. Raises InputError where one differs.
    """
    half = torch.rand(len(inputs), generator=draws) < 0.5
    for kept in (half, ~half):
        others = inputs[torch.randint(len(inputs), (len(inputs),), generator=draws)]
        others[kept] = inputs[kept]
        if not torch.equal(model(others)[kept], outputs[kept]):
            raise InputError(
                "the outputs for an example depend on the others of its batch; what is counted has to be what is "
                "measured"
            )


def _alike(one: Op, many: Op, size: int) -> bool:
    constants = [[v for v in op.inputs if v.is_constant] for op in (one, many)]
    results = zip(one.outputs, many.outputs, strict=False)
    return (
        one.name == many.name
        and len(constants[0]) == len(constants[1])
        and all(map(_same, *constants))
        and values_in(one) == values_in(many)
        and len(one.outputs) == len(many.outputs)
        and all(b.numel in (a.numel, a.numel * size) for a, b in results)
    )


def _same(a: Value, b: Value) -> bool:
    """Whether two constants have the same values: of a weight, one batch could read zeros and another the rest."""
    if a.shape != b.shape or a.dtype != b.dtype or a.data is None or b.data is None:
        return False
    return a.data is b.data or torch.equal(a.data, b.data)
