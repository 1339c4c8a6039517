"""Operations that only move values: free, each with a reason; and permutations, which the rules charge for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from micronet_eval.costs.cost import Cost
from micronet_eval.formats import ACCUMULATOR_OP, CONVERSIONS
from micronet_eval.trace import WRITE_OP, Op, Value

VIEW = "a view or a copy of the same values"
_MOVE = "moves values, computes none"
_FILL = "writes a constant"

FREE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (f"aten.{name}" for name in (
                "alias", "as_strided", "clone", "contiguous", "copy", "detach", "diagonal", "expand", "lift_fresh",
                "movedim", "narrow", "permute", "positive", "real", "select", "slice", "split", "split_with_sizes",
                "squeeze", "t", "transpose", "unbind", "unfold", "unsafe_chunk", "unsafe_split",
                "unsafe_split_with_sizes", "unsqueeze", "view", "view_as_complex", "view_as_real", "_unsafe_view",
                "_reshape_alias", "_reshape_copy", "resize", "resize_as",
            )),
            VIEW,
        ),
        **dict.fromkeys(
            (f"aten.{name}" for name in (
                "block_diag", "cat", "constant_pad_nd", "diag_embed", "diagonal_scatter", "embedding", "flip", "gather",
                "im2col", "index", "_unsafe_index", "index_copy", "index_fill", "index_select", "masked_fill",
                "masked_scatter", "max_unpool2d", "max_unpool3d", "pixel_shuffle", "pixel_unshuffle",
                "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "repeat", "repeat_interleave",
                "replication_pad1d", "replication_pad2d", "replication_pad3d", "roll", "rot90", "scatter",
                "select_scatter", "slice_scatter", "stack", "take", "tril", "triu", "upsample_nearest1d",
                "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
                "_upsample_nearest_exact3d", "where",
            )),
            _MOVE,
        ),
        **dict.fromkeys(
            (f"aten.{name}" for name in (
                "arange", "empty", "empty_like", "empty_strided", "eye", "fill", "full", "linspace", "new_empty",
                "new_empty_strided", "ones", "scalar_tensor", "zero", "zeros",
            )),
            _FILL,
        ),
        **dict.fromkeys(("aten._assert_async", "aten._assert_tensor_metadata"), "a check that computes nothing"),
        "aten._to_copy": "a conversion to a format that the same hardware computes in",
        **CONVERSIONS,
        ACCUMULATOR_OP: "the integers that a dot product is summed in",
        WRITE_OP: "what a partial write left as it was",
    }
)  # fmt: skip
"""Operations that cost nothing -> why."""

_RESHAPES = frozenset(
    f"aten.{name}"
    for name in ("view", "_unsafe_view", "_reshape_alias", "clone", "contiguous", "alias", "squeeze", "unsqueeze")
)  # fmt: skip
_REORDERS = frozenset({"aten.transpose", "aten.permute", "aten.t"})


def permutation(op: Op) -> Cost:
    """A permutation of channels is a product with a sparse matrix: 1 multiplication an element."""
    return Cost(mults=op.out.numel if permutes(op) else 0)


def permutes(op: Op) -> bool:
    """Whether `op` ends a permutation of one dimension: 1 multiplication an element, and the permutation is stored.

    Three forms are seen: nn.ChannelShuffle; view, transpose, view, as ShuffleNet writes it (`permutation_of`); and
    indexing along one dimension by a constant table with as many entries as there are elements.
    """
    return _by_table(op) or bool(permutation_of(op))


def permutation_of(op: Op) -> tuple[int, ...]:
    """The places that the elements of one dimension come from, where `op` ends a permutation of it, else nothing.

    Nothing, too, where that is a table that is a constant, and stored as such.

    A chain of views and transpositions that ends in the shape it began with permutes, if the elements along one
    dimension all change places alike: this is checked by really moving the numbers of the places. A transposition of
    whole dimensions is none, nor is one that leaves every element where it was.
    """
    if op.name in ("aten.channel_shuffle", "aten.native_channel_shuffle"):
        channels, groups = op.out.shape[1], op.args[1]
        order = torch.arange(channels).view(groups, -1).t().flatten()
        return tuple(order.tolist()) if 1 < groups < channels else ()
    if op.name not in ("aten.view", "aten._unsafe_view", "aten._reshape_alias"):
        return ()
    chain = _chain(op)
    if not any(step.name in _REORDERS for step in chain):
        return ()
    shape = op.out.shape
    places = torch.arange(op.out.numel).view(shape)
    moved = _replay(chain, places)
    for dim, size in enumerate(shape):
        step = int(places.stride(dim))
        order = moved.movedim(dim, 0).reshape(size, -1)[:, 0] // step
        if torch.equal(order, torch.arange(size)) or int(order.max()) >= size:
            continue
        if torch.equal(places.index_select(dim, order), moved):
            return tuple(order.tolist())
    return ()


def _by_table(op: Op) -> bool:
    if op.name not in ("aten.index", "aten.index_select") or op.out.shape != op.inputs[0].shape:
        return False
    found = op.args[2:3] if op.name == "aten.index_select" else op.args[1]
    tables: list[Value] = [t for t in found if t is not None]
    return len(tables) == 1 and tables[0].is_constant and tables[0].dtype != torch.bool  # a mask keeps the order


def _chain(op: Op) -> list[Op]:
    """The views and transpositions from the nearest value with the shape of the output of `op` to `op`; or none."""
    chain = [op]
    while len(chain) < 8:
        source = chain[0].inputs[0]
        if source.shape == op.out.shape:
            return chain
        producer = source.producer
        if producer is None or producer.name not in _RESHAPES | _REORDERS or not isinstance(producer.args[0], Value):
            return []
        chain.insert(0, producer)
    return []


def _replay(chain: list[Op], x: Tensor) -> Tensor:
    """What the chain makes of `x`."""
    for step in chain:
        if step.name == "aten.transpose":
            x = x.transpose(*step.args[1:3])
        elif step.name == "aten.permute":
            x = x.permute(*step.args[1])
        elif step.name == "aten.t":
            x = x.t()
        else:
            x = x.reshape(step.out.shape)
    return x
