"""Training and fine-tuning: optimizer, schedule, the losses around cross entropy; stopped and resumed at any epoch.

Everything random comes from torch's generators, seeded by the recipe, and from the loader's: all are part of a
checkpoint, so that a run that was killed ends with the same weights. Where several processes train together, each takes
its share of every batch: the batches, the schedule and the epochs are those of one process.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.utils import parametrize
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler

from micronet_eval.augmentation import Augmentation, augmenter
from micronet_eval.conditional import paths_of, taking
from micronet_eval.errors import InputError
from micronet_eval.files import write_whole
from micronet_eval.parallel import Team, team
from micronet_eval.strategy import Context
from micronet_eval.structure import original_of
from micronet_eval.submission import Table
from micronet_eval.task import readable
from micronet_eval.trace import Example

SMALL = 16
"""Edge of images below which the order of the channels does not matter for the speed."""

LARGEST_BATCH = 1 << 31
"""More than any data set has; what counts batches takes no larger numbers than 2^63."""

Log = Callable[[str], None]
Progress = Callable[[int], None]
"""Called with the batches that were done since the last call."""


class Distillation(Table):
    """Learns from the outputs of a teacher, too (Hinton et al. 2015, arXiv 1503.02531).

    loss = (1 - weight) * loss + weight * temperature^2 * KL(teacher's softmax || own softmax), both at `temperature`.
    The teacher is the submission in a folder, or several, whose logits are averaged, or else the uncompressed model.
    `views`: each example is augmented only so many times, and what the teacher says to that is kept; epochs take turns.
    Large teachers cost less so, and memory more: for each view the training data in float32, and the logits. 0 asks the
    teacher at every step.
    """

    weight: float = Field(0.5, gt=0, le=1)
    temperature: float = Field(4.0, gt=0)
    teacher: str | tuple[str, ...] = ""
    views: int = Field(0, ge=0)

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.teacher,) if self.teacher and isinstance(self.teacher, str) else tuple(self.teacher)


class Ensemble(nn.Module):
    """The mean of what several models say: of language models, that of their log-probabilities."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([logits_of(model, x) for model in self.models]).mean(0)


class Training(Augmentation):
    """Cross entropy on training data; of a conditional model the mean over its paths, each of which sees all examples.

    `schedule` falls to zero by a cosine, or by 10 at a half and at three quarters of the epochs behind the `warmup`, in
    which the rate rises linearly. `mixup` and `cutmix` are the alphas of their Beta distributions (arXiv 1710.09412,
    1905.04899), 0 for none; with both each batch draws one. `orthonormal` weighs the squared distance of each weight
    matrix' rows (or columns, where they are fewer) from an orthonormal set. `average` is the decay of an exponential
    moving average of the weights, which is what comes out; 0 for none. After n steps it is at most (1 + n) / (10 + n):
    the weights of the beginning are nothing to average. `precision = "bf16"` multiplies in bfloat16; weights stay at 32
    bits.
    """

    epochs: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(64, gt=0, le=LARGEST_BATCH)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(0.9, ge=0, lt=1)
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup: int = Field(0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    orthonormal: float = Field(0.0, ge=0)
    average: float = Field(0.0, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    distill: Distillation | None = None

    @model_validator(mode="after")
    def _warmup_ends(self) -> Training:
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup takes {self.warmup} of {self.epochs} epochs; leave some to train in")
        return self

    @model_validator(mode="after")
    def _views_are_whole(self) -> Training:
        if self.distill is not None and self.distill.views and (self.mixup or self.cutmix):
            raise ValueError("the teacher's views are of single examples: leave out distill.views, or mixup and cutmix")
        return self

    @model_validator(mode="after")
    def _momentum_is_used(self) -> Training:
        if self.optimizer == "adamw" and "momentum" in self.model_fields_set:
            raise ValueError('adamw has no momentum to set: leave it out, or take optimizer = "sgd"')
        return self


class Views(Dataset[tuple[Tensor, ...]]):
    """Examples as they were augmented, labels, and the teacher's logits; `turn` says which of the times."""

    def __init__(self, times: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.times = times
        self.turn = 0

    def __len__(self) -> int:
        return len(self.times[0][0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(column[index] for column in self.times[self.turn % len(self.times)])


class Shares(BatchSampler):
    """Of every batch the part that one of several processes takes; what cannot be split evenly is filled up."""

    def __init__(self, order: Sampler[int], batch_size: int, team: Team) -> None:
        super().__init__(order, batch_size, drop_last=False)
        self.team = team

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            fill = -len(batch) % self.team.size
            yield (batch + (batch * fill)[:fill])[self.team.rank :: self.team.size]


class Batches(DataLoader[tuple[Tensor, Tensor]]):
    """Batches of training data; raises InputError where it cannot be read."""

    def __iter__(self) -> Any:
        return readable(super().__iter__(), "training")


def loader(
    dataset: Dataset[Any], batch_size: int, seed: int, team: Team | None = None
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of a data set, shuffled by the seed; of each the share of this process, where a team is given."""
    order = torch.Generator().manual_seed(seed)
    shares = Shares(RandomSampler(dataset, generator=order), batch_size, team or Team(torch.device("cpu")))  # type: ignore[arg-type]
    return Batches(dataset, batch_sampler=shares, generator=order)


def train(
    model: nn.Module,
    training: Training,
    context: Context,
    log: Log = lambda line: None,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    progress: Progress = lambda batches: None,
    held_out: Dataset[Any] | None = None,
) -> nn.Module:
    """Trains `model` in place on the context's training data and returns it in evaluation mode, on the CPU.

    After each epoch all that goes on from there is written to `checkpoint`; where that file is there already, training
    goes on from it. `log` is told how each epoch went, and how many of `held_out` are right after it. Raises InputError
    where the data has labels that the model has no outputs for, and where the loss is not finite any more.
    """
    group = team()
    dataset = context.training_data.dataset
    batches = loader(dataset, training.batch_size, context.seed, group)
    fit = _Fit(model, training, context, len(batches), teacher, group)
    views = None
    if teacher is not None and training.distill is not None and training.distill.views:
        times = min(training.distill.views, training.epochs) if training.changes else 1
        log(f"  the teacher looks at {times} views of {len(dataset):,} examples")  # type: ignore[arg-type]
        views = fit.views(dataset, times, context.seed)
        batches = loader(views, training.batch_size, context.seed, group)
    done = fit.resume(checkpoint, batches) if checkpoint is not None and checkpoint.exists() else 0
    fit.join(context.seed, drawn=done > 0)
    for epoch in range(done, training.epochs):
        if views is not None:
            views.turn = epoch
        told = fit.epoch(batches, progress)
        if held_out is not None:
            told += f", {fit.right(held_out):.2%} held out"
        log(f"  epoch {epoch + 1} of {training.epochs}: {told}")
        if checkpoint is not None and epoch + 1 < training.epochs:
            fit.save(checkpoint, epoch + 1, batches)
    return fit.end()


class _Fit:
    """A model while it is trained: what an epoch changes."""

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        context: Context,
        batches: int,
        teacher: nn.Module | None,
        group: Team,
    ) -> None:
        self.training, self.team = training, group
        networks = [model] if teacher is None else [model, teacher]
        self.channels_last = all(takes_channels_last(network, context.example_input) for network in networks)
        self.model = model.to(group.device)
        self.paths = paths_of(model)
        self.whole = self.model
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        self.teacher = None if teacher is None else teacher.to(group.device).eval()
        self.augment = augmenter(training)
        self.optimizer = _optimizer(model, training)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate(training, batches))
        self.average = {name: v.clone() for name, v in model.state_dict().items()} if training.average else {}

    def join(self, seed: int, drawn: bool) -> None:
        """Lets the processes train together, each with random numbers of its own, if those are not `drawn` yet."""
        if self.team.rank and not drawn:
            torch.manual_seed(seed + 7919 * self.team.rank)
        self.whole = self.team.joined(self.model)

    def views(self, dataset: Dataset[Any], times: int, seed: int) -> Views:
        """So many augmented copies of a data set, and what the teacher says to them.

        The same whenever it is called: what is drawn for them is drawn for nothing else.
        """
        in_order = Batches(dataset, self.training.batch_size)
        columns: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.random.fork_rng([self.team.device] if self.team.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for _ in range(times):
                parts = []
                for inputs, labels in in_order:
                    inputs = self.augment(self.placed(inputs))
                    parts.append((inputs.cpu().contiguous(), labels, self.taught(self.placed(inputs)).cpu()))
                columns.append(tuple(map(torch.cat, zip(*parts, strict=True))))  # type: ignore[arg-type]
        return Views(columns)

    def taught(self, inputs: Tensor) -> Tensor:
        """The teacher's logits."""
        assert self.teacher is not None
        with torch.no_grad(), self.precision():
            return logits_of(self.teacher, inputs).float()

    def epoch(self, batches: Iterable[tuple[Tensor, ...]], progress: Progress) -> str:
        """One pass over the data; says how it went."""
        loss, right, examples = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64), 0
        loss, right = loss.to(self.team.device), right.to(self.team.device)
        self.model.train()
        for inputs, labels, *taught in batches:
            step_loss, step_right = self.step(inputs, labels, *taught)
            loss += step_loss.double() * labels.numel()
            right += step_right
            examples += labels.numel()
            progress(1)
        self.team.agree(self.model.state_dict().values())  # batch norm's statistics differ
        total, correct, count = self.team.sums(loss, right, examples)
        if not math.isfinite(total):
            raise InputError(f"train: the mean loss of an epoch is {total / count}; take a smaller learning_rate")
        return f"loss {total / count:.4f}, {correct / count:.2%} right"

    def step(self, inputs: Tensor, labels: Tensor, taught: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of the optimizer: the loss, and how many examples the model had right, on its last path.

        With what the teacher says to them come inputs that are augmented.
        """
        training, largest = self.training, int(labels.max())
        inputs, labels = self.placed(inputs), labels.to(self.team.device)
        inputs, other, share = mix(self.augment(inputs) if taught is None else inputs, training)
        inputs = self.placed(inputs)
        self.optimizer.zero_grad()
        answers = self.answers(inputs)
        outputs = answers[-1]
        if largest >= outputs.shape[-1]:
            raise InputError(f"train: label {largest} has no output; the model has {outputs.shape[-1]}")
        losses = [_loss(answer, labels, other, share, training) for answer in answers]
        if self.teacher is not None and (how := training.distill) is not None:
            taught = self.taught(inputs) if taught is None else taught.to(self.team.device)
            if taught.shape[-1] != outputs.shape[-1]:
                raise InputError(
                    f"train: the teacher has {taught.shape[-1]} outputs and the model {outputs.shape[-1]}; take one of "
                    "the same task"
                )
            learned = [distillation(answer, taught, how) for answer in answers]
            losses = [(1 - how.weight) * loss + more for loss, more in zip(losses, learned, strict=True)]
        loss = torch.stack(losses).mean()
        if training.orthonormal:
            loss = loss + training.orthonormal * orthonormality(self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        with learning_rate_factors(self.model):
            self.optimizer.step()
        self.schedule.step()
        done = self.schedule.last_epoch
        decay = min(training.average, (1 + done) / (10 + done))  # the weights at the start are nothing to average
        for name, value in (self.model.state_dict() if self.average else {}).items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)
        return loss.detach(), (outputs.argmax(-1) == labels).sum()

    def answers(self, inputs: Tensor) -> list[Tensor]:
        """The model's logits; of a conditional model those of each path, in their order, for all examples."""
        found = []
        for path in self.paths:
            with taking(self.model, path), self.precision():
                found.append(logits_of(self.whole, inputs).float())
        return found

    def placed(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.team.device)
        return inputs.contiguous(memory_format=torch.channels_last) if self.channels_last else inputs

    def precision(self) -> torch.autocast:
        return torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.training.precision == "bf16")

    def right(self, dataset: Dataset[Any]) -> float:
        """The share of a data set that the model, or the average of its weights, has right."""
        right = examples = 0
        trained = {name: v.clone() for name, v in self.model.state_dict().items()} if self.average else {}
        if self.average:
            self.model.load_state_dict(self.average)
        self.model.eval()
        with torch.no_grad(), self.precision(), parametrize.cached():
            for inputs, labels in loader(dataset, 256, 0, self.team):
                outputs = logits_of(self.model, self.placed(inputs))
                right += int((outputs.argmax(-1) == labels.to(self.team.device)).sum())
                examples += labels.numel()
        if trained:
            self.model.load_state_dict(trained)
        correct, count = self.team.sums(right, examples)
        return correct / count

    def save(self, path: Path, epochs: int, batches: DataLoader[tuple[Tensor, Tensor]]) -> None:
        """Writes all that training goes on from."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average,
            "epochs": epochs,
            "order": batches.generator.get_state(),
            "random": self.team.each(_random_state(self.team.device)),
        }
        if self.team.first:
            save(path, state)

    def resume(self, path: Path, batches: DataLoader[tuple[Tensor, Tensor]]) -> int:
        """Goes on from what was written; returns the epochs that are done."""
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged file makes torch raise many kinds
            raise InputError(f"{path} is damaged; remove {path.parent} to begin anew") from error
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.average = {name: value.to(self.team.device) for name, value in saved["average"].items()}
        batches.generator.set_state(saved["order"])
        if len(saved["random"]) != self.team.size:
            raise InputError(f"train: {path} was written by {len(saved['random'])} processes; resume with as many")
        on_cpu, *on_gpu = saved["random"][self.team.rank]
        torch.set_rng_state(on_cpu)
        for state in on_gpu:
            torch.cuda.set_rng_state(state, self.team.device)
        return int(saved["epochs"])

    def end(self) -> nn.Module:
        """The trained model."""
        if self.average:
            self.model.load_state_dict(self.average)
            self.team.agree(self.model.state_dict().values())
        for module in (self.model, self.teacher):
            if module is not None:
                module.to("cpu")
        if self.channels_last:
            self.model.to(memory_format=torch.contiguous_format)
        return self.model.eval()


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def takes_channels_last(model: nn.Module, example: Example) -> bool:
    """Whether a network of images is trained faster with its channels last, and can be.

    Small images are not worth it; a network that views its activations as other shapes cannot.
    """
    if not isinstance(example, Tensor) or example.dim() != 4 or min(example.shape[-2:]) < SMALL:
        return False
    training, images = model.training, example.expand(2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    try:
        for path in paths_of(model):
            with torch.no_grad(), taking(model, path):
                model.eval()(images)
    except RuntimeError:
        return False
    finally:
        model.train(training)
    return True


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
    Behind masks and quantizers it is what they are made of that changes so. Factors that no longer fit, as channels
    were removed since, are left out.
    """
    before = [
        (parameter, parameter.detach().clone(), factor)
        for module in model.modules()
        for name, factor in getattr(module, "learning_rate_factors", {}).items()
        if (parameter := original_of(module, name)).shape == factor.shape
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
        if not inputs.is_floating_point():
            raise InputError("train: mixup takes means of two inputs, not of tokens; leave it out")
        return torch.lerp(inputs[other], inputs, share), other, share
    if inputs.dim() < 4:
        shape = "x".join(map(str, inputs.shape))
        raise InputError(f"train: cutmix cuts pieces out of images, not of inputs of shape {shape}; leave it out")
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


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a model says; a language model says its state, too, which is left out.

    Raises InputError where batch norm is trained on one example, of one pixel.
    """
    try:
        outputs = model(inputs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "the last batch has one example, which batch norm cannot normalize; take another batch_size"
        ) from error
    logits: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits


def distillation(outputs: Tensor, taught: Tensor, how: Distillation) -> Tensor:
    """weight * temperature^2 * KL divergence, the mean over the batch."""
    own, given = (log_softmax(x.flatten(0, -2) / how.temperature, -1) for x in (outputs, taught))
    return how.weight * how.temperature**2 * kl_div(own, given, log_target=True, reduction="batchmean")


def orthonormality(model: nn.Module) -> Tensor:
    """The sum over layers of || W W^T - 1 ||^2, W being the weight as a matrix, the smaller side first."""
    total: Tensor | None = None
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            matrix = layer.weight.flatten(1)
            matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            distance = (matrix @ matrix.T - torch.eye(len(matrix), device=matrix.device)).square().sum()
            total = distance if total is None else total + distance
    return torch.zeros(()) if total is None else total
