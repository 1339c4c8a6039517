"""What the commonest operations return on the meta device, worked out here: torch's own kernels there are slow Python.

A rule gives tensors of the same shape, strides, dtype and memory as torch's kernel, or None where it does not hold:
then torch's kernel is asked, which also refuses what does not fit. A test compares each rule with it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

Result = Tensor | tuple[Tensor, ...] | None


META = torch.device("meta")


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=META)


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.empty_like, which is Python on the meta device, and imports sympy."""
    if x.is_contiguous():
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=META)
    return torch.empty_like(x, dtype=dtype)


def _plain(*tensors: Tensor) -> bool:
    """Floating point of one dtype, each laid out row by row."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype or not in_rows(tensor):
            return False
    return dtype.is_floating_point


def in_rows(t: Tensor) -> bool:
    """Contiguous, with the strides of a new tensor: those of dimensions of size 1 can be anything, and are kept."""
    return t.stride() == _strides(t.shape)


@cache
def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Those of a new tensor."""
    steps = accumulate(reversed(shape[1:]), lambda step, size: step * max(size, 1), initial=1)
    return tuple(steps)[::-1][: len(shape)]


def _like(x: Tensor, *numbers: Any, **more: Any) -> Result:
    """Element-wise on one tensor."""
    if any(isinstance(n, (Tensor, complex)) for n in numbers) or not _plain(x):
        return None
    return _empty(x.shape, x)


def _itself(x: Tensor, *numbers: Any, **more: Any) -> Result:
    """Element-wise on one tensor, in place."""
    return x if x.dtype.is_floating_point and not any(isinstance(n, (Tensor, complex)) for n in numbers) else None


def _both(x: Tensor, y: Any, **more: Any) -> Result:
    """Element-wise on two tensors, one of which may be repeated along dimensions of the other."""
    if not isinstance(y, Tensor) or not _plain(x, y):
        return None
    if x.shape == y.shape or _spreads(y, x):
        return _empty(x.shape, x)
    return _empty(y.shape, x) if _spreads(x, y) else None


def _into(x: Tensor, y: Any, **more: Any) -> Result:
    """Element-wise on two tensors, in place of the first."""
    fits = isinstance(y, Tensor) and x.dtype == y.dtype and (x.shape == y.shape or _spreads(y, x))
    return x if fits and x.dtype.is_floating_point else None


def _spreads(small: Tensor, large: Tensor) -> bool:
    """Whether the elements of one tensor are repeated along dimensions of the other, and not the other way, too."""
    behind = len(large.shape) - len(small.shape)
    return behind >= 0 and all(n in (1, m) for n, m in zip(small.shape, large.shape[behind:], strict=True))


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Result:  # fmt: skip
    dims = len(x.shape)
    if transposed or not dims - 2 == len(stride) == len(padding) == len(dilation) or len(weight.shape) != dims:
        return None
    (batch, channels, *sizes), (outputs, inputs, *kernel) = x.shape, weight.shape
    if not _plain(x, weight) or 0 in x.shape or 0 in weight.shape:
        return None
    if inputs * groups != channels or outputs % groups or (bias is not None and bias.shape != (outputs,)):
        return None
    shape = [batch, outputs]
    for size, k, step, pad, d in zip(sizes, kernel, stride, padding, dilation, strict=True):
        room = size + 2 * pad - d * (k - 1) - 1
        if room < 0 or step < 1:
            return None
        shape.append(room // step + 1)
    return _empty(shape, x)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **more: Any) -> Result:
    if bias.shape != b.shape[1:] or bias.dtype != a.dtype:
        return None
    return _mm(a, b)


def _mm(a: Tensor, b: Tensor) -> Result:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        return None
    return _empty((a.shape[0], b.shape[1]), a)


def _bmm(a: Tensor, b: Tensor) -> Result:
    if len(a.shape) != 3 or len(b.shape) != 3 or a.dtype != b.dtype:
        return None
    return _empty((*a.shape[:2], b.shape[2]), a) if a.shape[::2] == b.shape[:2] else None


def _pooled(x: Tensor, ceil: bool, *windows: list[int]) -> list[int] | None:
    """The shape behind a pooling by kernel, stride, padding, dilation; a single number holds for both dimensions.

    With `ceil` a last window may reach over the edge, if it begins inside.
    """
    kernel, stride, padding, dilation = (w * 2 if len(w) == 1 else w for w in windows)
    if len(x.shape) != 4 or not _plain(x) or 0 in x.shape:
        return None
    sizes = []
    for n, k, s, p, d in zip(x.shape[2:], kernel, stride or kernel, padding, dilation, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        if room < 0 or 2 * p > k:
            return None
        windows_along = (room + (s - 1) * ceil) // s + 1
        sizes.append(windows_along - (ceil and (windows_along - 1) * s >= n + p))
    return [*x.shape[:2], *sizes]


def _average(
    x: Tensor,
    kernel: list[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil: bool = False,
    *more: Any,
) -> Result:
    shape = _pooled(x, ceil, kernel, [*stride], [*padding], [1])
    return None if shape is None else _empty(shape, x)


def _maximum(
    x: Tensor, kernel: list[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,), ceil: bool = False,
) -> Result:  # fmt: skip
    shape = _pooled(x, ceil, kernel, [*stride], [*padding], [*dilation])
    return None if shape is None else (_empty(shape, x), torch.empty(shape, dtype=torch.int64, device=META))


def _mean(x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Result:
    if not dim or dtype is not None or not _plain(x) or not all(-len(x.shape) <= d < len(x.shape) for d in dim):
        return None
    reduced = {d % len(x.shape) for d in dim}
    if len(reduced) != len(dim):
        return None
    return _empty([1 if d in reduced else n for d, n in enumerate(x.shape) if keepdim or d not in reduced], x)


def _softmax(x: Tensor, dim: int, more: Any = None) -> Result:
    return _empty(x.shape, x) if not more and _plain(x) and -len(x.shape) <= dim < len(x.shape) else None


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    training: bool, *more: float,
) -> Result:  # fmt: skip
    given = [t for t in (weight, bias, mean, var) if t is not None]
    if training or mean is None or var is None or not _in_32_bits(x, *given) or len(x.shape) < 2:
        return None
    if any(t.shape != x.shape[1:2] for t in given):
        return None
    return _empty(x.shape, x), _empty(mean.shape, x), _empty(mean.shape, x)


def _layer_norm(x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Result:
    given = [t for t in (weight, bias) if t is not None]
    outer = len(x.shape) - len(shape)
    if not shape or not _in_32_bits(x, *given):
        return None
    if any(list(inner) != list(shape) for inner in (x.shape[outer:], *(t.shape for t in given))):
        return None
    groups = (*x.shape[:outer], *[1] * len(shape))
    return _empty(x.shape, x), _empty(groups, x), _empty(groups, x)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, channels: int, size: int, groups: int, eps: float
) -> Result:
    given = [t for t in (weight, bias) if t is not None]
    if not _in_32_bits(x, *given) or x.numel() != n * channels * size or channels % groups:
        return None
    if x.shape[:2] != (n, channels) or any(t.shape != (channels,) for t in given):
        return None
    return _empty(x.shape, x), _empty((n, groups), x), _empty((n, groups), x)


def _in_32_bits(*tensors: Tensor) -> bool:
    """Statistics of narrower values have other dtypes on some devices."""
    return tensors[0].dtype == torch.float32 and _plain(*tensors)


def _cat(tensors: list[Tensor], dim: int = 0) -> Result:
    first = tensors[0].shape
    if not first or not -len(first) <= dim < len(first) or not _plain(*tensors):
        return None
    dim %= len(first)
    if any(len(t.shape) != len(first) for t in tensors):
        return None
    if any(n != m for t in tensors for d, (n, m) in enumerate(zip(t.shape, first, strict=True)) if d != dim):
        return None
    return _empty([*first[:dim], sum(t.shape[dim] for t in tensors), *first[dim + 1 :]], tensors[0])


RULES: Mapping[Any, Callable[..., Result]] = MappingProxyType(
    {
        aten.convolution.default: _convolution,
        aten.native_batch_norm.default: _batch_norm,
        aten.native_layer_norm.default: _layer_norm,
        aten.native_group_norm.default: _group_norm,
        aten.addmm.default: _addmm,
        aten.mm.default: _mm,
        aten.bmm.default: _bmm,
        aten.avg_pool2d.default: _average,
        aten.max_pool2d_with_indices.default: _maximum,
        aten.mean.dim: _mean,
        aten._softmax.default: _softmax,
        aten._safe_softmax.default: _softmax,
        aten.cat.default: _cat,
        **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), _both),
        **dict.fromkeys((aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor), _into),
        **dict.fromkeys((aten.mul.Scalar, aten.div.Scalar), _like),
        **{
            getattr(aten, name).default: _like
            for name in (
                "relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu",
                "exp", "erf", "rsqrt", "sqrt", "neg",
            )
        },
        **{
            getattr(aten, name).default: _itself
            for name in ("relu_", "silu_", "sigmoid_", "hardswish_", "hardsigmoid_", "hardtanh_", "leaky_relu_", "elu_")
        },
    }
)  # fmt: skip
"""Operation -> what it returns, from its arguments."""


# --- the same again ---------------------------------------------------------------------------------------------------


def geometry(func: Any, args: Any, kwargs: Any) -> Hashable:
    """All that the shape of a new tensor depends on which an operation returns; None where it may return anything else.

    What an operation made of tensors laid out like these it will make again: a network repeats its layers.
    """
    if not _returns_new(func):
        return None
    try:
        key = func, hashable(args, _laid_out), hashable(kwargs, _laid_out)
        hash(key)
    except TypeError:
        return None
    return key


def is_new(result: Any) -> bool:
    """Whether a result is one tensor that fills the memory it lies in, as torch.empty_strided would make it."""
    if type(result) is not Tensor or result.storage_offset():
        return False
    reach = sum((n - 1) * step for n, step in zip(result.shape, result.stride(), strict=True)) + 1
    return result.untyped_storage().nbytes() == reach * result.dtype.itemsize and 0 not in result.shape


@cache
def _returns_new(func: Any) -> bool:
    schema = func._schema
    alone = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
    return alone and not schema.is_mutable and schema.returns[0].alias_info is None


def _laid_out(item: Any) -> Hashable:
    return (tuple(item.shape), item.stride(), item.dtype) if isinstance(item, Tensor) else typed(item)


def hashable(item: Any, each: Callable[[Any], Hashable] = lambda item: item) -> Hashable:
    """Arguments of any nesting as a key; `each` makes one of what is no list, tuple or dict."""
    if isinstance(item, (list, tuple)):
        return tuple([hashable(part, each) for part in item])
    if isinstance(item, dict):
        return tuple([(name, hashable(part, each)) for name, part in item.items()])
    return each(item)


def typed(item: Any) -> Hashable:
    """A number with its type, since 1 == 1.0 == True."""
    return type(item), item
