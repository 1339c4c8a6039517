"""Biases and scales alone, in fewer bits."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.formats import AffineQuantizer, SignQuantizer, block_indices
from micronet_eval.merge import merged
from micronet_eval.strategy import Context, Quantizer
from micronet_eval.structure import copied
from micronet_plugins.layerwise import least_error, quantize_each, rest_of, set_weight, weights_of
from micronet_plugins.weights import parametrizations_of


class Biases(Quantizer):
    """Batch norm merged, and biases and all else of fewer than two dimensions that is not rounded yet in fixed point.

    What comes behind a quantizer of weights and activations that kept batch norm (`keep_batch_norm`), and the training
    after that. With `scale_bits = 16` the scales of weights become floats of 16 bits, and the integers and signs stay.
    A scale changes by 2^-11 of itself at most, in float16, or 2^-8 where that is too coarse or narrow for one of them,
    in bfloat16. A multiplication by it then counts 16 bits, if the step of what the layer reads, and that of the codes
    that its output becomes, are powers of two.
    """

    bits: int = Field(16, ge=2, le=24, description="bits of a bias")
    scale_bits: Literal[16, 32] = Field(32, description="bits of the scales of weights")

    @property
    def goes_behind_another(self) -> bool:
        return True

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(merged(model, context.example_input))
        if self.scale_bits == 16:
            _halve_scales(model)
        rest = [(m, n) for m, n in rest_of(model) if not parametrize.is_parametrized(m, n)]
        quantize_each(rest, lambda module, name: least_error(getattr(module, name), self.bits))
        return model.eval()


def _halve_scales(model: nn.Module) -> None:
    done: set[nn.Module] = set()  # tied weights share one
    for layer, name in weights_of(model):
        last = on_it[-1] if (on_it := parametrizations_of(layer, name)) is not None else None
        if not isinstance(last, AffineQuantizer | SignQuantizer) or last in done or parametrize.is_parametrized(last):
            continue
        done.add(last)
        weight, wide = getattr(layer, name).detach(), last.scale.detach().clone()
        with torch.no_grad():
            last.scale.copy_(_halved(wide))
        if isinstance(last, AffineQuantizer):  # signs do not depend on a scale
            where = block_indices(weight.shape, last.blocks or tuple(weight.shape))
            set_weight(layer, name, (weight / wide[where]).round() * last.scale.detach()[where])


def _halved(scales: Tensor) -> Tensor:
    normal = torch.finfo(torch.float16)
    fits = bool(((scales >= normal.tiny) & (scales <= normal.max)).all())
    return scales.to(torch.float16 if fits else torch.bfloat16)
