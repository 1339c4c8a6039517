"""Biases alone, in fixed point."""

from __future__ import annotations

from pydantic import Field
from torch import nn
from torch.nn.utils import parametrize

from micronet_eval.merge import merged
from micronet_eval.strategy import Context, Quantizer
from micronet_eval.structure import copied
from micronet_plugins.layerwise import least_error, quantize_each, rest_of


class Biases(Quantizer):
    """Batch norm merged, and biases and all else of fewer than two dimensions that is not rounded yet in fixed point.

    What comes behind a quantizer of weights and activations that kept batch norm (`keep_batch_norm`), and the training
    after that.
    """

    bits: int = Field(16, ge=2, le=24, description="bits of a bias")

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(merged(model, context.example_input))
        rest = [(m, n) for m, n in rest_of(model) if not parametrize.is_parametrized(m, n)]
        quantize_each(rest, lambda module, name: least_error(getattr(module, name), self.bits))
        return model.eval()
