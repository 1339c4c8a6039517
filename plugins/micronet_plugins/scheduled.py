"""Sparsifiers that train while the zeros grow, by the cubic schedule of Zhu and Gupta 2017 (arXiv 1710.01878)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, repeat

import torch
from pydantic import Field
from torch import Tensor, nn

from micronet_eval.errors import InputError
from micronet_eval.strategy import Context, Sparsifier
from micronet_eval.structure import Mask, copied
from micronet_eval.training import loader, logits_of
from micronet_plugins.magnitude import LIMIT, SPARSITY, set_mask, zero_smallest, zeros_by_layer
from micronet_plugins.weights import by_weight, parametrizations_of, sharing, weight_of


class Scheduled(Sparsifier):
    """What both share: AdamW, a learning rate that falls to zero by a cosine, and the schedule of the sparsity."""

    sparsity: float = SPARSITY
    limit: float = LIMIT
    epochs: int = Field(5, gt=0, description="epochs of training on training data")
    learning_rate: float = Field(1e-3, gt=0, description="learning rate at the start")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of the weights")
    batch_size: int = Field(64, gt=0, description="examples of a training step")
    ramp: float = Field(0.7, gt=0, le=1, description="share of the training in which the sparsity grows")

    def sparsity_at(self, done: float) -> float:
        """The sparsity after a share `done` of the training: s (1 - (1 - t)^3), t the share of the ramp."""
        return self.sparsity * (1 - (1 - min(done / self.ramp, 1.0)) ** 3)


class Gradual(Scheduled):
    """Zeros ever more of the smallest weights while it trains, on a cubic schedule.

    Zhu and Gupta 2017, arXiv 1710.01878: s_t = s (1 - (1 - t)^3), fast while there is much to spare, slow at the end. A
    weight that is zero stays zero. Better than `magnitude` and training afterwards, at high sparsity above all.
    """

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(model)
        layers = list(by_weight(model).values())
        for done in training(model, self, context):
            magnitudes = [weight_of(layer).abs().flatten() for layer in layers]
            zeros = zeros_by_layer(magnitudes, self.sparsity_at(done), self.limit)
            for layer, magnitude, lost in zip(layers, magnitudes, zeros, strict=True):
                zero_smallest(model, layer, magnitude, lost)
        return model.eval()


class Movement(Scheduled):
    """Zeros while it trains the weights that move towards zero, wherever they stand.

    Sanh et al. 2020, arXiv 2005.07683: score S = -sum over steps of w x dL/dw, straight through the mask, so that a
    weight can come back while the sparsity grows; the lowest scores of the network are zero. For fine-tuning on a task
    other than that of the first training, where the size of a weight says little.
    """

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(model)
        layers = list(by_weight(model).values())
        moved = [watch(model, layer) for layer in layers]
        for done in training(model, self, context):
            scores = [m.scores.flatten() for m in moved]
            zeros = zeros_by_layer(scores, self.sparsity_at(done), self.limit)
            for movement, score, lost in zip(moved, scores, zeros, strict=True):
                movement.mask = movement.scores > -torch.inf  # zeros of another mask stay
                movement.mask.view(-1)[score.argsort(stable=True)[:lost]] = False
        for layer, movement in zip(layers, moved, strict=True):
            _exchange(model, layer, Mask(movement.mask))
        return model.eval()


class _Moved(Mask):
    """A mask that adds up the movement scores of its weight: every gradient counts, behind the mask as well.

    What another mask holds at zero scores minus infinity.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask)
        self.scores = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    def forward(self, weight: Tensor) -> Tensor:
        masked = super().forward(weight)
        if masked.requires_grad:
            masked.register_hook(lambda gradient: self.add(gradient, weight.detach()))  # type: ignore[no-untyped-call]
        return masked

    def add(self, gradient: Tensor, weight: Tensor) -> None:
        self.scores = self.scores - gradient * weight


def watch(model: nn.Module, layer: nn.Module) -> _Moved:
    """Puts a `_Moved` in the place of the layer's mask, or where there was none."""
    set_mask(model, layer, torch.ones_like(weight_of(layer), dtype=torch.bool))
    movement = _Moved(next(p.mask for p in parametrizations_of(layer) or () if isinstance(p, Mask)))
    _exchange(model, layer, movement)
    return movement


def _exchange(model: nn.Module, layer: nn.Module, mask: Mask) -> None:
    """Puts `mask` in the place of the layer's mask, and of that of all modules that hold its weight."""
    for other, name in sharing(model, layer):
        parametrizations = parametrizations_of(other, name)
        assert parametrizations is not None
        position = next(i for i, p in enumerate(parametrizations) if isinstance(p, Mask))
        parametrizations[position] = mask


def training(model: nn.Module, options: Scheduled, context: Context) -> Iterator[float]:
    """Trains `model` in place with cross entropy; yields the share that is done, a hundred times at most."""
    if not len(context.training_data.dataset):  # type: ignore[arg-type]
        raise InputError("there is no training data to train on")
    batches = loader(context.training_data.dataset, options.batch_size, context.seed)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    steps = options.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step, (inputs, labels) in enumerate(chain.from_iterable(repeat(batches, options.epochs)), 1):
        optimizer.zero_grad()
        loss_of(model, inputs, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if 100 * step // steps > 100 * (step - 1) // steps:
            yield step / steps


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy, of a language model over all words, of segmentation over all places.

    Classes are the last dimension where the others are those of the labels, as (texts, words, classes), else the
    second, as (images, classes, height, width). Raises InputError where neither is so, or for a label without output.
    """
    logits = logits_of(model, inputs)
    if logits.dim() <= 3 and logits.shape[:-1] == labels.shape:
        logits, labels = logits.flatten(0, -2), labels.flatten()
    elif logits.shape[:1] + logits.shape[2:] != labels.shape:
        outputs, told = ("x".join(map(str, t.shape)) for t in (logits, labels))
        raise InputError(f"labels of {told} do not fit outputs of {outputs}")
    if (largest := int(labels.max())) >= logits.shape[1]:
        raise InputError(f"label {largest} has no output; the model has {logits.shape[1]}")
    return nn.functional.cross_entropy(logits, labels)


def labelled(context: Context, batches: int, strategy: str) -> list[tuple[Tensor, Tensor]]:
    """So many batches of training data. Raises InputError where there is none."""
    if not (data := list(islice(context.training_data, batches))):
        raise InputError(f"{strategy}: there is no training data to take gradients on")
    return data
