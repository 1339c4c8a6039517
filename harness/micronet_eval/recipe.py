"""Recipes: ordered stages that turn a registered architecture into a submission.

task = "digits"
seed = 0
[architecture]
name = "wide-resnet"
[[stages]]
train = { epochs = 30, learning_rate = 0.002 }
[[stages]]
pruner = "low-rank"
parameters = 20_000
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, TensorDataset

from micronet_eval import packing, plugins
from micronet_eval.errors import InputError
from micronet_eval.files import write_whole
from micronet_eval.merge import BOTH, merged, without_batch_norm
from micronet_eval.paths import mean_account
from micronet_eval.strategy import Context, Strategy
from micronet_eval.submission import (
    RECIPE,
    WEIGHTS,
    Architecture,
    Claims,
    Manifest,
    Provenance,
    Share,
    Step,
    Table,
    build,
    read_toml,
    write_manifest,
)
from micronet_eval.task import DataMissing, Task
from micronet_eval.trace import trace

STRATEGIES: tuple[plugins.Kind, ...] = ("pruner", "sparsifier", "quantizer")
NOISE_EXAMPLES = 256

Log = Callable[[str], None]


class Training(Table):
    """Fine-tuning on training data with AdamW, a learning rate that falls to zero by a cosine, cross entropy."""

    epochs: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(64, gt=0)


class Statistics(Table):
    """Estimates batch norm's running mean and variance anew, as plain averages over batches of training data."""

    batches: int = Field(gt=0)


class Stage(BaseModel):
    """One stage: exactly one of the fields below; beside a strategy stand its options.

    `merge` merges batch norm into the layers before and behind it, or backward only.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    train: Training | None = None
    statistics: Statistics | None = None
    merge: Literal["batch-norm", "batch-norm-backward"] | None = None
    pruner: str | None = None
    sparsifier: str | None = None
    quantizer: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Stage:
        if len(self.model_fields_set & set(type(self).model_fields)) != 1:
            raise ValueError(f"a stage has exactly one of: {', '.join(type(self).model_fields)}")
        if self.strategy_kind is None and self.__pydantic_extra__:
            raise ValueError(f"only a strategy has options, not: {', '.join(self.__pydantic_extra__)}")
        return self

    @property
    def strategy_kind(self) -> plugins.Kind | None:
        return next((kind for kind in STRATEGIES if getattr(self, kind) is not None), None)

    def __str__(self) -> str:
        (field,) = self.model_fields_set & set(type(self).model_fields)
        value = getattr(self, field)
        return f"{field} {value}" if isinstance(value, str) else field


class About(Table):
    """What the submission's manifest will say; see submission.Manifest."""

    name: str
    authors: list[str]
    note: str = ""
    claims: Claims = Claims()
    paths: dict[str, Share] = Field(default_factory=dict)


class Recipe(Table):
    """recipe.toml. `data = "noise"` trains and calibrates on seeded normal noise, where the real data cannot be had."""

    task: str
    seed: int = 0
    data: Literal["task", "noise"] = "task"
    batch_size: int = Field(32, gt=0)
    architecture: Architecture
    stages: list[Stage] = Field(min_length=1)
    submission: About


def compress(path: Path, folder: Path, data: Path | None = None, log: Log = lambda line: None) -> None:
    """Runs a recipe and writes the submission that comes out of it. The same recipe gives the same files.

    Raises InputError where the recipe is wrong or the training data is missing.
    """
    recipe = read_toml(path, Recipe)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder; name another one to write")
    if not next(parent for parent in (folder, *folder.absolute().parents) if parent.exists()).is_dir():
        raise InputError(f"{folder} cannot be made: a part of its path is a file; name another folder")
    try:
        task: Task = plugins.lookup("task", recipe.task)
        strategies = [_strategy(stage, i) for i, stage in enumerate(recipe.stages)]
        training = _training_data(recipe, task, data)
    except (InputError, DataMissing) as error:
        raise InputError(f"{path}: {error}") from error
    example = torch.zeros(1, *task.input_shape)
    torch.manual_seed(recipe.seed)
    model = build(recipe.architecture, path, weights=True)
    try:
        steps = [_step("architecture", model, example)]
    except InputError as error:
        raise InputError(f"{path}: field 'architecture': {error}") from error
    log(_progress(steps[-1]))
    for number, (stage, strategy) in enumerate(zip(recipe.stages, strategies, strict=True), 1):
        seed = recipe.seed + number
        torch.manual_seed(seed)
        context = Context(example, _loader(training, recipe.batch_size, seed), seed, plugins.formulas())
        try:
            model = _run(stage, strategy, model, context, log)
            steps.append(_step(str(stage), model, example))
        except InputError as error:
            raise InputError(f"{path}: field 'stages.{number - 1}': {error}") from error
        log(_progress(steps[-1]))
    architecture = build(recipe.architecture, path)
    model = merged(model, example)
    packed = packing.pack(model, architecture, example)
    about = recipe.submission
    manifest = Manifest(
        name=about.name,
        task=recipe.task,
        authors=about.authors,
        architecture=recipe.architecture,
        claims=about.claims,
        paths=about.paths,
        provenance=Provenance(note=about.note, data=recipe.data, steps=steps),
    )
    text = path.read_bytes()
    try:
        packing.write(packed, folder / WEIGHTS)
        write_manifest(folder, manifest)
        write_whole(folder / RECIPE, text)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; name another folder") from error


def _strategy(stage: Stage, index: int) -> Strategy | None:
    kind = stage.strategy_kind
    if kind is None:
        return None
    name = getattr(stage, kind)
    strategy: type[Strategy] = plugins.lookup(kind, name)
    try:
        return strategy(**(stage.__pydantic_extra__ or {}))
    except ValidationError as error:
        fault = error.errors()[0]
        option = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            unknown = plugins.unknown("option", option, strategy.model_fields)
            raise InputError(f"field 'stages.{index}': {kind} {name}: {unknown}") from error
        raise InputError(f"field 'stages.{index}': {kind} {name}: option {option!r}: {fault['msg']}") from error


def _run(stage: Stage, strategy: Strategy | None, model: nn.Module, context: Context, log: Log) -> nn.Module:
    if strategy is not None:
        return strategy.apply(model, context)
    if stage.train is not None:
        return train(model, stage.train, context, log)
    if stage.statistics is not None:
        return estimate_statistics(model, stage.statistics, context)
    return merged(model, context.example_input, BOTH if stage.merge == "batch-norm" else ("backward",))


def _step(name: str, model: nn.Module, example: Tensor) -> Step:
    # Batch norm as the two values a channel that it is; where it may be merged is for the recipe to say.
    model = without_batch_norm(copy.deepcopy(model))
    counted = mean_account(trace(model, example), plugins.formulas(), freebie=False)
    return Step(
        stage=name,
        parameters=counted.storage.parameters,
        nonzeros=counted.storage.nonzeros,
        mults=int(counted.math.mults),
        adds=int(counted.math.adds),
    )


def _progress(step: Step) -> str:
    return (
        f"{step.stage}: {step.parameters:,} parameters, {step.nonzeros:,} non-zero, "
        f"{step.mults + step.adds:,} operations"
    )


def _training_data(recipe: Recipe, task: Task, root: Path | None) -> Dataset[Any]:
    if recipe.data == "task":
        return task.dataset(root, "train")
    generator = torch.Generator().manual_seed(recipe.seed)
    inputs = torch.randn(NOISE_EXAMPLES, *task.input_shape, generator=generator)
    return TensorDataset(inputs, torch.zeros(NOISE_EXAMPLES, dtype=torch.int64))


def _loader(dataset: Dataset[Any], batch_size: int, seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, training: Training, context: Context, log: Log) -> nn.Module:
    """Trains `model` in place on the context's training data and returns it in evaluation mode."""
    loader = _loader(context.training_data.dataset, training.batch_size, context.seed)
    optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs * len(loader))
    model.train()
    for epoch in range(training.epochs):
        loss_sum, correct = 0.0, 0
        for inputs, labels in loader:
            optimizer.zero_grad()
            logits = model(inputs)
            if (largest := int(labels.max())) >= logits.shape[1]:
                raise InputError(f"train: label {largest} has no output; the model has {logits.shape[1]}")
            loss = nn.functional.cross_entropy(logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            with learning_rate_factors(model):
                optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
        examples = len(cast(Sized, loader.dataset))
        log(f"  epoch {epoch + 1} of {training.epochs}: loss {loss_sum / examples:.4f}, {correct / examples:.2%} right")
    return model.eval()


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


def estimate_statistics(model: nn.Module, statistics: Statistics, context: Context) -> nn.Module:
    """Sets batch norm's running statistics in place, from the context's training data; returns the model."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    with torch.no_grad():
        for inputs in context.calibration(statistics.batches):
            model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
