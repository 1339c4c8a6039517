"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): weights rounded one by one, the error passed on to those to come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.errors import InputError
from micronet_eval.formats import Affine, AffineQuantizer, block_indices
from micronet_eval.strategy import Context
from micronet_eval.structure import Mask, layer_type, original_of
from micronet_plugins.calibration import Calibration, affine_format
from micronet_plugins.layerwise import (
    Granularity,
    WeightQuantizer,
    blocks_of,
    quantize_each,
    set_weight,
    weights_of,
)
from micronet_plugins.weights import calibration_data, run_watched, upper_factor_of_inverse, watchable

_BLOCK = 128  # columns


class GPTQ(WeightQuantizer):
    """Rounds weights so that the outputs of each layer change least on training data; integers with scales.

    Layer by layer, on inputs that the layers before it, already quantized, give: H = 2 X X^T + damping; then column by
    column w is rounded to q, and (w - q) / [H^-1]_ii [H^-1]_i is taken from the columns behind it. Convolutions are
    matrices over their unfolded inputs, each group its own; zeros of a mask stay. Other weights are rounded to nearest,
    those that something else reads, too, among them: a table of words that is the embedding and the softmax.
    Use it at 2 to 4 bits where there is no time for fine-tuning; scales cost what those of `affine` do.
    """

    weight_bits: int = Field(4, ge=2, le=16, description="bits of a weight")
    granularity: Granularity = Field("channel", description="what shares a scale: tensor, channel or group")
    group_size: int = Field(32, gt=0, description="inputs (each with its kernel) of one output that share a scale")
    symmetric: bool = Field(True, description="no zero points")
    calibration: Calibration = Field("mse", description="range of weights: sigma, max or mse (least squared error)")
    sigmas: float = Field(6, gt=0, description="for sigma: mean -+ so many standard deviations")
    damping: float = Field(0.01, gt=0, description="share of the mean diagonal of H that is added to it")

    def quantize_weights(self, model: nn.Module, context: Context) -> None:
        batches = calibration_data(context, self.batches, "gptq")
        shared: dict[int, nn.Module] = {}
        in_order = _in_order(model, batches[0])
        found = watchable(model, batches[0]) if in_order else {}
        tied = {layer: layers for layers in found.values() for layer in layers}
        for layer in in_order:
            original = id(original_of(layer, "weight"))
            if layer not in tied or original in shared:
                continue  # something else reads the weight, or it is done
            weight: Tensor = layer.weight.detach()  # type: ignore[operator]
            number_format = self._format(layer, weight)
            hessian = hessians(model, tied[layer], batches)
            set_weight(layer, "weight", round_weight(weight, hessian, number_format, self.damping, _mask(layer)))
            shared[original] = AffineQuantizer(number_format)
            parametrize.register_parametrization(layer, "weight", shared[original], unsafe=True)
        quantize_each(weights_of(model), self.quantizer, shared)

    def quantizer(self, layer: nn.Module, name: str) -> nn.Module:
        return AffineQuantizer(self._format(layer, getattr(layer, name).detach()))

    def _format(self, layer: nn.Module, weight: Tensor) -> Affine:
        blocks = blocks_of(layer, weight, self.granularity, self.group_size)
        return affine_format(weight, self.weight_bits, blocks, self.symmetric, self.calibration, self.sigmas)


def _in_order(model: nn.Module, inputs: Tensor) -> list[nn.Module]:
    """The convolutions (2d) and linear layers in the order in which they run first."""
    ran: dict[nn.Module, None] = {}

    def note(layer: nn.Module, x: Tensor) -> None:
        ran[layer] = None

    layers = [m for m in model.modules() if layer_type(m) in (nn.Conv2d, nn.Linear)]
    run_watched(model, [inputs], {layer: partial(note, layer) for layer in layers})
    return list(ran)


def hessians(model: nn.Module, layers: Sequence[nn.Module], batches: list[Tensor]) -> Tensor:
    """2 X X^T over all inputs that reach layers of one weight, [groups, inputs, inputs].

    Kernel positions are among the inputs.
    """
    found: list[Tensor] = []

    def add(layer: nn.Module, x: Tensor) -> None:
        columns = unfolded(layer, x).double()
        product = 2 * columns @ columns.transpose(1, 2)
        found[:] = [found[0] + product] if found else [product]

    run_watched(model, batches, {layer: partial(add, layer) for layer in layers})
    if not found:
        raise InputError(
            "gptq: behind quantized layers no calibration data reach a layer any more, as every example takes another "
            "path; take more batches, or more bits"
        )
    if not bool(torch.isfinite(found[0]).all()):
        raise InputError("gptq: the squares of what a layer reads are not finite; train the model first")
    return found[0]


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """What each dot product of a layer sees, [groups, inputs, positions]."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1]).T[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x if x.dim() == 4 else x[None], layer._reversed_padding_repeated_twice, mode)
    columns = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    return columns.transpose(0, 1).reshape(layer.groups, columns.shape[1] // layer.groups, -1)


def round_weight(
    weight: Tensor, hessian: Tensor, number_format: Affine, damping: float, mask: Tensor | None = None
) -> Tensor:
    """The weight on the grid of its format, by Algorithm 1 of the paper, columns in the order that they have.

    `hessian` is [groups, inputs, inputs]. What `mask` leaves out is rounded to 0.
    """
    groups, count, _ = hessian.shape
    where = block_indices(weight.shape, number_format.blocks)
    scales = number_format.scales.double()[where].view(groups, -1, count)
    zeros = torch.zeros_like(scales)
    if number_format.zero_points is not None:
        zeros = number_format.zero_points.double()[where].view(groups, -1, count)
    kept = torch.ones_like(scales) if mask is None else mask.double().view(groups, -1, count)
    left, codes = weight.double().view(groups, -1, count).clone(), torch.empty_like(scales)
    upper = _upper_factor_of_inverse(hessian, damping)
    errors = torch.empty_like(scales)
    for start in range(0, count, _BLOCK):  # the columns behind a block learn of its errors all at once
        stop = min(start + _BLOCK, count)
        for i in range(start, stop):
            step, zero = scales[..., i], zeros[..., i]
            code = ((left[..., i] / step).round() + zero).clamp(number_format.low, number_format.high) - zero
            codes[..., i] = code * kept[..., i]
            errors[..., i] = (left[..., i] - codes[..., i] * step) / upper[:, i, i, None]
            left[..., i:stop] -= errors[..., i, None] * upper[:, None, i, i:stop]
        left[..., stop:] -= errors[..., start:stop] @ upper[:, start:stop, stop:]
    return (codes.float() * scales.float()).view(weight.shape).to(weight.dtype)


def _upper_factor_of_inverse(hessian: Tensor, damping: float) -> Tensor:
    """U with H^-1 = U^T U: its rows are those of the inverse that the elimination of the columns before leaves."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    unseen = torch.diag_embed((diagonal == 0).to(hessian.dtype))  # inputs that are always 0
    eye = torch.eye(hessian.shape[1], dtype=hessian.dtype)
    damped = hessian + unseen + damping * diagonal.mean(1).clamp(min=1e-12)[:, None, None] * eye
    return upper_factor_of_inverse(damped)


def _mask(layer: nn.Module) -> Tensor | None:
    """Which weights a mask keeps."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    masks = [p.mask for p in layer.parametrizations["weight"] if isinstance(p, Mask)]  # type: ignore[index]
    return torch.stack(masks).all(0) if masks else None
