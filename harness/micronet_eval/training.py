"""Training and fine-tuning: optimizer, schedule, the losses around cross entropy; stopped and resumed at any epoch.

Everything random comes from torch's generator, seeded by the recipe, and from the loader's: both are part of a
checkpoint, so that a run that was killed ends with the same weights.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.data import DataLoader, Dataset

from micronet_eval.errors import InputError
from micronet_eval.files import write_whole
from micronet_eval.strategy import Context
from micronet_eval.submission import Table

Log = Callable[[str], None]
Progress = Callable[[int], None]
"""Called with the batches that were done since the last call."""


class Distillation(Table):
    """Learns from the outputs of the uncompressed model, too (Hinton et al. 2015, arXiv 1503.02531).

    loss = (1 - weight) * loss + weight * temperature^2 * KL(teacher's softmax || own softmax), both at `temperature`.
    """

    weight: float = Field(0.5, gt=0, le=1)
    temperature: float = Field(4.0, gt=0)


class Training(Table):
    """Cross entropy on training data.

    `schedule` falls to zero by a cosine, or by 10 at a half and at three quarters of the epochs, after `warmup` epochs
    in which the rate rises linearly. `mixup` and `cutmix` are the alphas of their Beta distributions (arXiv 1710.09412,
    1905.04899), 0 for none; with both each batch draws one. `orthonormal` weighs the squared distance of each weight
    matrix' rows (or columns, where they are fewer) from an orthonormal set. `average` is the decay of an exponential
    moving average of the weights, which is what comes out; 0 for none.
    """

    epochs: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(64, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(0.9, ge=0, lt=1)
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup: int = Field(0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    orthonormal: float = Field(0.0, ge=0)
    average: float = Field(0.0, ge=0, lt=1)
    distill: Distillation | None = None

    @model_validator(mode="after")
    def _warmup_ends(self) -> Training:
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup takes {self.warmup} of {self.epochs} epochs; leave some to train in")
        return self


def loader(dataset: Dataset[Any], batch_size: int, seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of a data set, shuffled by the seed."""
    return DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def train(
    model: nn.Module,
    training: Training,
    context: Context,
    log: Log = lambda line: None,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    progress: Progress = lambda batches: None,
) -> nn.Module:
    """Trains `model` in place on the context's training data and returns it in evaluation mode.

    After each epoch all that goes on from there is written to `checkpoint`; where that file is there already, training
    goes on from it. Raises InputError where the data has labels that the model has no outputs for.
    """
    batches = loader(context.training_data.dataset, training.batch_size, context.seed)
    optimizer = _optimizer(model, training)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate(training, len(batches)))
    average = {name: value.clone() for name, value in model.state_dict().items()} if training.average else {}
    done = 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        average, done = saved["average"], saved["epochs"]
        batches.generator.set_state(saved["order"])
        torch.set_rng_state(saved["random"])
    model.train()
    if teacher is not None:
        teacher.eval()
    for epoch in range(done, training.epochs):
        told = _epoch(model, training, batches, optimizer, schedule, average, teacher, progress)
        log(f"  epoch {epoch + 1} of {training.epochs}: {told}")
        if checkpoint is not None and epoch + 1 < training.epochs:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "average": average,
                "epochs": epoch + 1,
                "order": batches.generator.get_state(),
                "random": torch.get_rng_state(),
            }
            save(checkpoint, state)
    if average:
        model.load_state_dict(average)
    return model.eval()


def _epoch(
    model: nn.Module,
    training: Training,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    average: dict[str, Tensor],
    teacher: nn.Module | None,
    progress: Progress,
) -> str:
    """One pass over the data; says how it went."""
    loss_sum, correct, examples = 0.0, 0, 0
    for inputs, labels in batches:
        optimizer.zero_grad()
        inputs, other, share = mix(inputs, training)
        outputs = _outputs(model, inputs)
        if (largest := int(labels.max())) >= outputs.shape[-1]:
            raise InputError(f"train: label {largest} has no output; the model has {outputs.shape[-1]}")
        loss = _loss(outputs, labels, other, share, training)
        if teacher is not None and training.distill is not None:
            with torch.no_grad():
                taught = _outputs(teacher, inputs)
            loss = (1 - training.distill.weight) * loss + distillation(outputs, taught, training.distill)
        if training.orthonormal:
            loss = loss + training.orthonormal * orthonormality(model)
        loss.backward()  # type: ignore[no-untyped-call]
        with learning_rate_factors(model):
            optimizer.step()
        schedule.step()
        for name, value in (model.state_dict() if average else {}).items():
            if value.is_floating_point():
                average[name].lerp_(value, 1 - training.average)
            else:
                average[name].copy_(value)
        loss_sum += loss.item() * labels.numel()
        correct += int((outputs.argmax(-1) == labels).sum())
        examples += labels.numel()
        progress(1)
    return f"loss {loss_sum / examples:.4f}, {correct / examples:.2%} right"


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    if training.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=training.weight_decay)
    momentum, decay = training.momentum, training.weight_decay
    return torch.optim.SGD(
        model.parameters(), training.learning_rate, momentum, weight_decay=decay, nesterov=momentum > 0
    )


@contextmanager
def learning_rate_factors(model: nn.Module) -> Iterator[None]:
    """Multiplies what an optimizer's step in here changes by the factors that a pruner set for some elements.

    A module may have an attribute `learning_rate_factors`: parameter name -> tensor of its shape, 1 for the usual rate.
    """
    before = [
        (parameter := getattr(module, name), parameter.detach().clone(), factor)
        for module in model.modules()
        for name, factor in getattr(module, "learning_rate_factors", {}).items()
    ]
    yield
    with torch.no_grad():
        for parameter, old, factor in before:
            parameter.copy_(old.lerp(parameter, factor.to(parameter)))


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes tensors and numbers, whole or not at all; torch.load(path, weights_only=True) reads them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def rate(training: Training, batches: int) -> Callable[[int], float]:
    """The share of the learning rate at each step; an epoch has so many."""
    first, last = training.warmup * batches, training.epochs * batches

    def share(step: int) -> float:
        if step < first:
            return (step + 1) / first
        along = (step - first) / (last - first)
        if training.schedule == "cosine":
            return (1 + math.cos(math.pi * along)) / 2
        return 0.1 ** ((along >= 0.5) + (along >= 0.75)) if training.schedule == "step" else 1.0

    return share


def mix(inputs: Tensor, training: Training) -> tuple[Tensor, Tensor, float]:
    """Each input mixed with another of the batch: the result, which one, and the share that is left of the first."""
    if not training.mixup and not training.cutmix:
        return inputs, torch.arange(len(inputs)), 1.0
    cut = bool(training.cutmix) and (not training.mixup or bool(torch.rand(()) < 0.5))
    alpha = training.cutmix if cut else training.mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = torch.randperm(len(inputs))
    if not cut:
        return torch.lerp(inputs[other], inputs, share), other, share
    height, width = inputs.shape[-2:]
    rows, columns = (round(n * math.sqrt(1 - share)) for n in (height, width))
    top, left = int(torch.randint(height - rows + 1, ())), int(torch.randint(width - columns + 1, ()))
    box = (..., slice(top, top + rows), slice(left, left + columns))
    inputs = inputs.clone()
    inputs[box] = inputs[other][box]
    return inputs, other, 1 - rows * columns / (height * width)


def _loss(outputs: Tensor, labels: Tensor, other: Tensor, share: float, training: Training) -> Tensor:
    def against(targets: Tensor) -> Tensor:
        return cross_entropy(outputs.flatten(0, -2), targets.flatten(), label_smoothing=training.label_smoothing)

    return against(labels) if share == 1 else share * against(labels) + (1 - share) * against(labels[other])


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs = model(inputs)
    logits: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs  # a language model returns its state, too
    return logits


def distillation(outputs: Tensor, taught: Tensor, how: Distillation) -> Tensor:
    """weight * temperature^2 * KL divergence, the mean over the batch."""
    own, given = (log_softmax(x.flatten(0, -2) / how.temperature, -1) for x in (outputs, taught))
    return how.weight * how.temperature**2 * kl_div(own, given, log_target=True, reduction="batchmean")


def orthonormality(model: nn.Module) -> Tensor:
    """The sum over layers of || W W^T - 1 ||^2, W being the weight as a matrix, the smaller side first."""
    total = torch.zeros(())
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            matrix = layer.weight.flatten(1)
            matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            total = total + (matrix @ matrix.T - torch.eye(len(matrix))).square().sum()
    return total
