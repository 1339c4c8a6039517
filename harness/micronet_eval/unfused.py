"""One defined way to run: the same plain operations whatever the device, the gradient mode and torch's fast paths.

On the CPU without gradients torch runs attention, transformer layers and LSTMs as single opaque operations. On the
meta device, with the two switches set here, all of them run as matrix products, softmax and element-wise operations.

The first state of a recurrent layer is all zeros, and products with it could be left out. But a step counts as any
other, as if the sequence had begun before: the state is no constant here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


@contextmanager
def unfused() -> Iterator[None]:
    """Attention as two products and a softmax, transformer layers as their parts, written-out constants with values."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _DefinedMode():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


_RECURRENT = {
    getattr(torch._VF, name)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
}


_MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}
_INDEXED = {Tensor.__getitem__, Tensor.__setitem__}
_DEFINED = {*_MAKERS, Tensor.new_tensor, *_INDEXED, *_RECURRENT}


class _DefinedMode(TorchFunctionMode):
    """A tensor that the forward writes out as numbers is made of them first, and then goes where the model is.

    On the meta device the numbers would be lost, although what the model computes may depend on them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _DEFINED:
            return func(*args, **kwargs)
        if func in _MAKERS and not isinstance(args[0] if args else None, Tensor):
            return self._made(func(*args, **{**kwargs, "device": "cpu"}), kwargs.get("device"))
        if func is Tensor.new_tensor:
            like, *data = args
            options = {"dtype": like.dtype, **kwargs, "device": "cpu"}
            return self._made(torch.tensor(*data, **options), kwargs.get("device", like.device))
        if func in _RECURRENT:
            x, state, *rest = args
            return func(x, tree_map(partial(_as_if_computed_from, x), state), *rest, **kwargs)
        if func in _INDEXED:
            tensor, index, *rest = args
            index = tuple(map(_table, index)) if isinstance(index, tuple) else _table(index)
            return func(tensor, index, *rest)
        return func(*args, **kwargs)

    @staticmethod
    def _made(constant: Tensor, device: Any) -> Tensor:
        return constant if device is None else constant.to(device)


def _as_if_computed_from(x: Tensor, state: Any) -> Any:
    """A copy of the state into a tensor that `x` made."""
    if not isinstance(state, Tensor):
        return state
    return torch.ops.aten.copy.default(x.new_empty(state.shape, dtype=state.dtype), state)


def _table(index: Any) -> Any:
    """A list of places as a tensor; every other index as it is."""
    if not isinstance(index, list) or not all(isinstance(i, int) for i in index):
        return index
    return torch.tensor(index, dtype=torch.bool if index and isinstance(index[0], bool) else torch.int64, device="cpu")
