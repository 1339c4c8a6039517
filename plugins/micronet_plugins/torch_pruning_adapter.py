"""torch-pruning's own pruner (https://github.com/VainF/Torch-Pruning), as its users call it."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.errors import InputError
from micronet_eval.strategy import Context, Pruner
from micronet_eval.structure import copied, quantizers_of
from micronet_eval.trace import trace
from micronet_plugins.coupling import all_outputs, need_torch_pruning, output_layers
from micronet_plugins.scheduled import labelled, loss_of
from micronet_plugins.weights import dot_products

Importance = Literal["magnitude", "taylor", "bn-scale", "fpgm", "lamp", "random"]
CLASSES: dict[Importance, str] = {
    "magnitude": "GroupMagnitudeImportance",
    "taylor": "GroupTaylorImportance",
    "bn-scale": "BNScaleImportance",
    "fpgm": "FPGMImportance",
    "lamp": "LAMPImportance",
    "random": "RandomImportance",
}


class TorchPruning(Pruner):
    """Channels removed by torch-pruning's own pruner and importance; the classifier's outputs stay.

    Fang et al. 2023, arXiv 2301.12900. `ratio` is torch-pruning's: a share of channels, not of parameters. Use it to
    see what a network pruned by torch-pruning would score; `magnitude`, `taylor` and others choose by our own criteria.
    """

    ratio: float = Field(0.5, gt=0, lt=1, description="share of the channels to remove")
    importance: Importance = Field("magnitude", description="which of torch-pruning's importances ranks the channels")
    across: Literal["layers", "network"] = Field(
        "layers", description="the same share of each layer, or the least important ones of the network"
    )
    limit: float = Field(0.9, gt=0, le=1, description="largest share of its channels that one layer may lose")
    round_to: int = Field(1, gt=0, description="channels of a layer stay a multiple of this")
    batches: int = Field(4, gt=0, description="batches of training data for the gradients of taylor")

    def model_post_init(self, context: Any) -> None:
        need_torch_pruning()

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        if not isinstance(context.example_input, Tensor):
            raise InputError("torch-pruning: channels are removed of models with one input, an image or a vector")
        tp: Any = importlib.import_module("torch_pruning")
        if quantizers_of(model) or any(parametrize.is_parametrized(layer) for layer in model.modules()):
            raise InputError("torch-pruning: put it before sparsifiers and quantizers")
        model = copied(model).eval()
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        model.requires_grad_(True)
        outputs = output_layers(model, context.example_input)
        importance = getattr(tp.importance, CLASSES[self.importance])()
        if self.importance == "taylor":
            for inputs, labels in labelled(context, self.batches, "torch-pruning"):
                loss_of(model, inputs, labels).backward()  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pruner = tp.pruner.BasePruner(
                    model,
                    context.example_input,
                    importance=importance,
                    pruning_ratio=self.ratio,
                    max_pruning_ratio=self.limit,
                    global_pruning=self.across == "network",
                    round_to=self.round_to,
                    forward_fn=all_outputs,
                    ignored_layers=[layer for path, layer in dot_products(model).items() if path in outputs]
                    + [m for m in model.modules() if isinstance(m, nn.modules.instancenorm._InstanceNorm)],
                )
                pruner.step()
                trace(model, context.example_input)
            except Exception as error:  # whatever its walk over a model that it cannot follow raises
                raise InputError(
                    "torch-pruning cannot prune the model; magnitude leaves out what it cannot, low-rank and "
                    f"eigendamage prune without it: {type(error).__name__}: {error}"
                ) from error
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
            parameter.grad = None
        return model
