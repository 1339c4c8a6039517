"""What each operation costs: one small function per kind of operation, from its record to a Cost.

The rules are those of the MicroNet Challenge (docs/scoring.md); a formula that the rules leave open is marked (ours).
An operation that is neither in FORMULAS nor in FREE nor added by a plugin is an error, never a silent zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from micronet_eval.errors import InputError
from micronet_eval.formats import FIXED_POINT_OP
from micronet_eval.trace import WRITE_OP, Op, Value


@dataclass(frozen=True)
class Cost:
    """Operations of one executed operation: multiplications, element-wise additions, and additions that accumulate.

    Accumulating additions (of a dot product, a mean, a sum) count at 32 bit whatever goes in. `macs` says how many of
    the multiplications belong to dot products.
    """

    mults: int = 0
    adds: int = 0
    accumulations: int = 0
    macs: int = 0

    @property
    def all_adds(self) -> int:
        return self.adds + self.accumulations


Formula = Callable[[Op], Cost]


class NoFormula(InputError):
    """An operation was executed for which nothing says what it costs."""

    def __init__(self, op: Op, why: str = "") -> None:
        where = f"in module {op.module!r}" if op.module else "in the model's own forward"
        super().__init__(
            f"no cost formula for operation {op.name} {where}{': ' + why if why else ''}; "
            "a plugin can add one with the hook micronet_register_costs"
        )


def cost_of(op: Op, formulas: Mapping[str, Formula]) -> Cost | None:
    """The cost of `op`, or None where it is declared free. Raises NoFormula where nobody knows."""
    if formula := formulas.get(op.name):
        return formula(op)
    if op.name in FREE:
        return None
    raise NoFormula(op)


# --- dot products -----------------------------------------------------------------------------------------------------


def dot_products(nonzeros: int, outputs: int, times: int, bias: bool) -> Cost:
    """The cost of `times` repetitions of a set of dot products with constant weights.

    With n non-zero weights behind an output: n multiplications, max(n - 1, 0) additions, one more with a bias (n > 0).
    `nonzeros` is the sum of n over all outputs of one repetition, `outputs` the number of those with n > 0.
    """
    mults = nonzeros * times
    return Cost(mults=mults, accumulations=mults - (0 if bias else outputs * times), macs=mults)


def nonzeros_by_output(weight: Value, output_dim: int) -> tuple[int, int]:
    """Non-zero weights, and outputs with at least one, of a weight whose dimension `output_dim` counts the outputs.

    A weight without values (on the meta device) counts as dense.
    """
    outputs = weight.shape[output_dim]
    if weight.data is None or weight.data.device.type == "meta":
        return weight.numel, outputs
    counts = (weight.data != 0).movedim(output_dim, 0).reshape(outputs, -1).sum(1)
    return int(counts.sum()), int((counts > 0).sum())


def convolution(op: Op) -> Cost:
    """Any number of dimensions, groups and dilations; multiplications with padding count."""
    _, weight, bias, _, _, _, transposed = op.args[:7]
    if transposed:
        raise NoFormula(op, "transposed convolutions are not counted yet")
    nonzeros, outputs = nonzeros_by_output(weight, 0)
    return dot_products(nonzeros, outputs, op.out.numel // weight.shape[0], bias is not None)


def mm(op: Op) -> Cost:
    """A matrix product without bias, also in batches."""
    return matrix_product(op, op.args[0], op.args[1], bias=False)


def addmm(op: Op) -> Cost:
    """A matrix product with bias: a linear layer, or attention with a mask."""
    return matrix_product(op, op.args[1], op.args[2], bias=True)


def matrix_product(op: Op, a: Value, b: Value, bias: bool) -> Cost:
    """[..., M, K] x [..., K, N]: one dot product of K terms an output; zeros of a constant factor are left out."""
    m, n = a.shape[-2], b.shape[-1]
    if b.is_constant and not a.is_constant:
        nonzeros, outputs = nonzeros_by_matrix(b, -1)
        return dot_products(nonzeros, outputs, m, bias)
    if a.is_constant and not b.is_constant:
        nonzeros, outputs = nonzeros_by_matrix(a, -2)
        return dot_products(nonzeros, outputs, n, bias)
    return dot_products(op.out.numel * a.shape[-1], op.out.numel, 1, bias)


def nonzeros_by_matrix(weight: Value, output_dim: int) -> tuple[int, int]:
    """As `nonzeros_by_output`, summed over the batch dimension that a matrix of bmm has in front."""
    if weight.data is None or weight.data.device.type == "meta":
        return weight.numel, weight.numel // weight.shape[-3 - output_dim]
    counts = (weight.data != 0).sum(-3 - output_dim)
    return int(counts.sum()), int((counts > 0).sum())


# --- element-wise and reductions --------------------------------------------------------------------------------------


def elementwise(mults: int, adds: int = 0) -> Formula:
    """So many multiplications and additions for every element of the output."""
    return lambda op: Cost(mults * op.out.numel, adds * op.out.numel)


def add(op: Op) -> Cost:
    """Addition and subtraction; `alpha` other than 1 scales the second operand first."""
    scaled = op.arg(2, "alpha", 1) not in (1, -1)
    return Cost(mults=op.out.numel if scaled else 0, adds=op.out.numel)


def clamp(op: Op) -> Cost:
    """One comparison an element for each bound that there is, counted as ReLU's multiplication. *(ours)*"""
    bounds = (op.arg(1, "min"), op.arg(2, "max"))
    return Cost(mults=op.out.numel * sum(bound is not None for bound in bounds))


def mean(op: Op) -> Cost:
    """Over k elements: k - 1 additions and 1 multiplication by 1/k."""
    return Cost(mults=op.out.numel, accumulations=op.inputs[0].numel - op.out.numel)


def total(op: Op) -> Cost:
    """Sum over k elements: k - 1 additions. *(ours)*"""
    return Cost(accumulations=op.inputs[0].numel - op.out.numel)


def largest(op: Op) -> Cost:
    """Maximum or minimum over k elements: k - 1 comparisons, counted as additions. *(ours)*"""
    return Cost(adds=op.inputs[0].numel - op.out.numel)


def max_pool(op: Op) -> Cost:
    """Over k elements: k - 1 comparisons, counted as additions. *(ours)*"""
    return Cost(adds=op.out.numel * (math.prod(op.args[1]) - 1))


def avg_pool(op: Op) -> Cost:
    """Over k elements: k - 1 additions and 1 multiplication."""
    return Cost(mults=op.out.numel, accumulations=op.out.numel * (math.prod(op.args[1]) - 1))


def adaptive_avg_pool(op: Op) -> Cost:
    """Average pooling whose window for output i of o over n inputs goes from floor(i n / o) to ceil((i + 1) n / o)."""
    outputs = op.args[1]
    sizes = op.inputs[0].shape[-len(outputs) :]
    channels = op.out.numel // math.prod(outputs)
    elements = math.prod(
        sum(-(-(i + 1) * n // o) - i * n // o for i in range(o)) for n, o in zip(sizes, outputs, strict=True)
    )
    return Cost(mults=op.out.numel, accumulations=channels * elements - op.out.numel)


def softmax(op: Op) -> Cost:
    """Over k elements: k exponentials, k - 1 additions, k divisions. *(ours)*"""
    k = op.out.shape[op.args[1]] if op.out.shape else 1
    return Cost(mults=2 * op.out.numel, accumulations=op.out.numel - op.out.numel // k)


def log_softmax(op: Op) -> Cost:
    """Over k elements: k exponentials, k - 1 additions, 1 logarithm, k subtractions. *(ours)*"""
    k = op.out.shape[op.args[1]] if op.out.shape else 1
    groups = op.out.numel // k
    return Cost(mults=op.out.numel + groups, adds=op.out.numel, accumulations=op.out.numel - groups)


def vector_norm(op: Op) -> Cost:
    """Over k elements: k squares, k - 1 additions, 1 square root. *(ours)*"""
    elements = op.inputs[0].numel
    return Cost(mults=elements + op.out.numel, accumulations=elements - op.out.numel)


def batch_norm(op: Op) -> Cost:
    """In evaluation a fixed scale and shift for each channel: 1 multiplication and 1 addition an element.

    Without running statistics (instance norm, too) it computes those of its input, as executed.
    """
    if op.name == "aten.native_batch_norm" and op.args[5]:
        x, weight, bias = op.args[:3]
        return normalization(x.shape[1], x.numel, weight is not None, bias is not None)
    return Cost(mults=op.out.numel, accumulations=op.out.numel)


def normalization(groups: int, elements: int, scale: bool, shift: bool) -> Cost:
    """Layer and group norm as executed, for each group of k elements. *(ours)*

    mean (k - 1 additions, 1 multiplication), centring (k additions), variance (k multiplications, k - 1 additions,
    1 multiplication), epsilon (1 addition), reciprocal square root (1), scaling (k), then weight (k) and bias (k).
    """
    k = elements // groups
    mults = 1 + k + 1 + 1 + k + (k if scale else 0)
    return Cost(groups * mults, groups * (k + 1 + (k if shift else 0)), groups * 2 * (k - 1))


def layer_norm(op: Op) -> Cost:
    """A group is what one mean is taken over: the trailing dimensions."""
    x, shape, weight, bias = op.args[:4]
    return normalization(x.numel // math.prod(shape), x.numel, weight is not None, bias is not None)


def group_norm(op: Op) -> Cost:
    """A group is what one mean is taken over: a group of channels of one example."""
    x, weight, bias, batch, _, _, groups = op.args[:7]
    return normalization(batch * groups, x.numel, weight is not None, bias is not None)


FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        "aten.convolution": convolution,
        "aten.mm": mm,
        "aten.bmm": mm,
        "aten.addmm": addmm,
        "aten.baddbmm": addmm,
        "aten.relu": elementwise(1),
        "aten.leaky_relu": elementwise(1),
        "aten._prelu_kernel": elementwise(1),
        "aten.hardtanh": elementwise(2),  # ReLU6 too (ours)
        "aten.clamp": clamp,
        "aten.clamp_min": elementwise(1),  # (ours)
        "aten.clamp_max": elementwise(1),  # (ours)
        "aten.sigmoid": elementwise(2, 1),
        "aten.silu": elementwise(3, 1),
        "aten.hardsigmoid": elementwise(2, 1),  # (ours)
        "aten.hardswish": elementwise(3, 1),  # (ours)
        "aten.gelu": elementwise(4, 1),  # (ours)
        "aten.tanh": elementwise(1),
        "aten.exp": elementwise(1),
        "aten.log": elementwise(1),
        "aten.sqrt": elementwise(1),
        "aten.rsqrt": elementwise(1),
        "aten.reciprocal": elementwise(1),
        "aten.erf": elementwise(1),
        "aten.pow": elementwise(1),
        "aten.neg": elementwise(1),
        "aten.abs": elementwise(1),
        "aten.eq": elementwise(0, 1),  # a comparison is a subtraction (ours)
        "aten.ne": elementwise(0, 1),
        "aten.mul": elementwise(1),
        "aten.div": elementwise(1),
        "aten.add": add,
        "aten.sub": add,
        "aten.rsub": add,
        "aten.mean": mean,
        "aten.sum": total,
        "aten.amax": largest,
        "aten.max_pool2d_with_indices": max_pool,
        "aten.avg_pool2d": avg_pool,
        "aten._adaptive_avg_pool2d": adaptive_avg_pool,
        "aten._softmax": softmax,
        "aten._safe_softmax": softmax,
        "aten._log_softmax": log_softmax,
        "aten.linalg_vector_norm": vector_norm,
        "aten.native_batch_norm": batch_norm,
        "aten._native_batch_norm_legit_no_training": batch_norm,
        "aten.native_layer_norm": layer_norm,
        "aten.native_group_norm": group_norm,
    }
)

_VIEW = "a view or a copy of the same values"
_MOVE = "moves values, computes none"
_FILL = "writes a constant"

FREE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("alias", "as_strided", "clone", "contiguous", "copy", "detach", "expand", "lift_fresh", "permute",
             "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsafe_split",
             "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "_reshape_copy", "unfold", "diagonal"),
            _VIEW,
        ),
        **dict.fromkeys(
            ("cat", "stack", "constant_pad_nd", "roll", "index", "index_select", "embedding", "gather", "repeat",
             "flip", "reflection_pad2d", "replication_pad2d", "upsample_nearest1d", "upsample_nearest2d",
             "upsample_nearest3d", "masked_fill", "where"),
            _MOVE,
        ),
        **dict.fromkeys(("fill", "zero", "empty", "empty_like", "new_empty", "arange", "zeros", "ones", "full"), _FILL),
        "_to_copy": "a conversion to a format that the same hardware computes in",
    }
)  # fmt: skip
FREE = MappingProxyType(
    {
        **{f"aten.{name}": why for name, why in FREE.items()},
        FIXED_POINT_OP: "a conversion to fixed point",
        WRITE_OP: "what a partial write left as it was",
    }
)

ADDENDS: Mapping[str, int] = MappingProxyType({"aten.convolution": 2, "aten.addmm": 0, "aten.baddbmm": 0})
"""Which argument of an operation is only added: its width does not matter to the multiplications."""

SELECTS = frozenset({"aten.relu", "aten.max_pool2d_with_indices", "aten.amax"})
"""Priced operations whose results are some of their inputs, or zero: the results need no more bits than the inputs."""
