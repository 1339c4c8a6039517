"""Activation functions and arithmetic: so many operations for every element of the output."""

from __future__ import annotations

from micronet_eval.costs.cost import Cost, Formula
from micronet_eval.trace import Op


def elementwise(mults: int, adds: int = 0) -> Formula:
    """So many multiplications and additions for every element of the output."""
    return lambda op: Cost(mults * op.out.numel, adds * op.out.numel)


def add(op: Op) -> Cost:
    """Addition and subtraction; `alpha` other than 1 scales the second operand first."""
    scaled = op.arg(2, "alpha", 1) not in (1, -1)
    return Cost(mults=op.out.numel if scaled else 0, adds=op.out.numel)


def add_product(op: Op) -> Cost:
    """x + value * a * b, or / b: 1 addition, 1 multiplication, 1 more with a value other than 1."""
    scaled = op.arg(3, "value", 1) not in (1, -1)
    return Cost(mults=op.out.numel * (2 if scaled else 1), adds=op.out.numel)


def clamp(op: Op) -> Cost:
    """1 multiplication for each of the bounds that is given, as ReLU has for its one. *(ours)*"""
    bounds = sum(op.arg(i, name) is not None for i, name in ((1, "min"), (2, "max")))
    return Cost(mults=bounds * op.out.numel)


def elu(op: Op) -> Cost:
    """The choice, as in ReLU, 1; exp 1, -1 an addition; 1 for each factor that is not 1 (also SELU). *(ours)*"""
    alpha, scale, input_scale = op.arg(1, "alpha", 1), op.arg(2, "scale", 1), op.arg(3, "input_scale", 1)
    factors = (scale != 1 or alpha != 1) + (input_scale != 1)
    return Cost(mults=(2 + factors) * op.out.numel, adds=op.out.numel)


def celu(op: Op) -> Cost:
    """ELU of x / alpha, scaled by alpha. *(ours)*"""
    factors = 2 if op.arg(1, "alpha", 1) != 1 else 0
    return Cost(mults=(2 + factors) * op.out.numel, adds=op.out.numel)


_ONE = (
    "relu", "leaky_relu", "_prelu_kernel", "rrelu_with_noise", "threshold", "hardshrink", "mul", "div", "pow", "neg",
    "abs", "square", "reciprocal", "floor_divide", "deg2rad", "rad2deg",
)  # fmt: skip
"""1 multiplication: ReLU and its kin, products, and *(ours)* negation and absolute value."""

_TRANSCENDENTAL = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "erf", "erfc", "erfinv", "lgamma",
    "digamma", "sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "asinh", "acosh", "atanh", "atan2",
)  # fmt: skip
"""A transcendental function is 1 operation, counted with the multiplications."""

_BITWISE = (
    "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "bitwise_left_shift", "bitwise_right_shift", "__and__",
    "__or__", "__xor__", "__lshift__", "__rshift__", "logical_and", "logical_or", "logical_xor", "logical_not", "floor",
    "ceil", "round", "trunc", "frac", "sign", "sgn", "copysign", "signbit",
)  # fmt: skip
"""A bitwise operation is 1 operation, counted with the multiplications; so are rounding and signs. *(ours)*"""

_COMPARISONS = (
    "eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum", "fmax", "fmin", "isnan", "isinf", "isposinf", "isneginf",
    "heaviside",
)  # fmt: skip
"""A comparison is a subtraction: 1 addition. *(ours)*"""

FORMULAS: dict[str, Formula] = {
    **{f"aten.{name}": elementwise(1) for name in (*_ONE, *_TRANSCENDENTAL, *_BITWISE)},
    **{f"aten.{name}": elementwise(0, 1) for name in _COMPARISONS},
    "aten.add": add,
    "aten.sub": add,
    "aten.rsub": add,
    "aten.addcmul": add_product,
    "aten.addcdiv": add_product,
    "aten.lerp": elementwise(1, 2),  # a + w (b - a)
    "aten.remainder": elementwise(2, 1),  # a - b floor(a / b) (ours)
    "aten.fmod": elementwise(2, 1),  # (ours)
    "aten.hypot": elementwise(3, 1),  # two squares, sum, root (ours)
    "aten.logaddexp": elementwise(3, 1),  # two exponentials, sum, logarithm (ours)
    "aten.logaddexp2": elementwise(3, 1),
    "aten.logit": elementwise(2, 1),  # log(x / (1 - x)) (ours)
    "aten.xlogy": elementwise(2),
    "aten.sinc": elementwise(3),  # sin(pi x) / (pi x) (ours)
    "aten.nan_to_num": elementwise(0, 3),  # three comparisons (ours)
    "aten.linalg_cross": elementwise(2, 1),
    "aten.clamp": clamp,
    "aten.clamp_min": elementwise(1),  # (ours)
    "aten.clamp_max": elementwise(1),  # (ours)
    "aten.hardtanh": elementwise(2),  # ReLU6 too (ours)
    "aten.sigmoid": elementwise(2, 1),
    "aten.silu": elementwise(3, 1),
    "aten.hardsigmoid": elementwise(2, 1),  # (ours)
    "aten.hardswish": elementwise(3, 1),  # (ours)
    "aten.gelu": elementwise(4, 1),  # (ours)
    "aten.elu": elu,
    "aten.celu": celu,
    "aten.glu": elementwise(3, 1),  # a sigmoid and a product (ours)
    "aten.softplus": elementwise(2, 1),  # log(1 + exp(x)) (ours)
    "aten.log_sigmoid_forward": elementwise(2, 1),  # log(1 / (1 + exp(-x))), as softplus (ours)
    "aten.mish": elementwise(4, 1),  # x tanh(softplus(x)) (ours)
    "aten.softshrink": elementwise(1, 1),  # the choice, as in ReLU, and lambda subtracted (ours)
}
