"""Fast AutoAugment (Lim et al. 2019, arXiv 1905.00397): a policy of augmentations, found by density matching.

The training data is split into folds. For each fold a network is trained on the others, without augmentation; then
policies are searched that keep its loss on the fold, augmented, low: augmented images should be such as the network has
learned to know. No network is trained again for a policy. The best policies of all folds make one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Subset

from micronet_eval import plugins
from micronet_eval.augmentation import OPERATIONS, Augmentation, Change, Operation, Policy, applier
from micronet_eval.errors import InputError
from micronet_eval.parallel import team
from micronet_eval.recipe import Recipe, Told, data_of, named_stages
from micronet_eval.strategy import Context
from micronet_eval.submission import Table, build, read_toml
from micronet_eval.task import DataMissing, Task
from micronet_eval.training import Log, Training, loader, train

LENGTH = 2
"""Operations of a sub-policy, as in the paper."""

BATCH = 250

SubPolicies = list[list[Operation]]


class Search(Table):
    """How much is searched: `trials` policies of `size` sub-policies a fold, of which the `top` ones are taken.

    Each is tried on at most `examples` of its fold.
    """

    folds: int = Field(5, ge=2)
    trials: int = Field(100, gt=0)
    top: int = Field(5, gt=0)
    size: int = Field(5, gt=0)
    examples: int = Field(2000, gt=0)


def search(
    path: str | Path,
    how: Search,
    data: str | Path | None = None,
    log: Log = lambda line: None,
    progress: Told = lambda done, total: None,
) -> Policy:
    """The policy for a recipe: for its task, its training data without what it holds out, its network and training.

    `progress` is called with the batches that are trained so far, and all that there are. The same recipe gives the
    same policy. Raises InputError where the recipe is wrong, has no training, or is not for images, where training data
    are missing, where a network's loss is not finite, and where optuna is not installed.
    """
    _optuna()
    path, root = Path(path), None if data is None else Path(data)
    recipe = read_toml(path, Recipe)
    try:
        task: Task = plugins.lookup("task", recipe.task)
        examples, _ = data_of(recipe, task, root)
    except (InputError, DataMissing) as error:
        raise InputError(f"{path}: {error}") from error
    training = next((stage.train for _, stage in named_stages(recipe.stages) if stage.train is not None), None)
    if training is None or len(task.input_shape) != 3:
        raise InputError(f"{path}: a policy is searched for a recipe that trains on images")
    low, high = ranges(examples)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(recipe.seed))  # type: ignore[arg-type]
    if len(order) < how.folds:
        raise InputError(f"{path}: {len(order):,} training examples are fewer than {how.folds} folds; take fewer folds")
    folds = order.tensor_split(how.folds)
    done, total = 0, sum(-(-(len(order) - len(fold)) // training.batch_size) for fold in folds) * training.epochs

    def trained(batches: int) -> None:
        nonlocal done
        done += batches
        progress(done, total)

    found: SubPolicies = []
    for number, fold in enumerate(folds):
        rest = torch.cat([other for other in folds if other is not fold])
        seed = recipe.seed + number
        torch.manual_seed(seed)
        model = build(recipe.architecture, path, weights=True)
        batches = loader(Subset(examples, rest.tolist()), training.batch_size, seed)
        context = Context(torch.zeros(1, *task.input_shape), batches, seed, plugins.formulas())
        log(f"fold {number + 1} of {how.folds}: training on {len(rest):,} examples")
        held_out = Subset(examples, fold[: how.examples].tolist())
        try:
            train(model, plain(training), context, log, progress=trained)
            for subs in _best(model.to(team().device), held_out, how, low, high, seed, log):
                found += subs
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return Policy(low=low, high=high, sub_policies=found)


def plain(training: Training) -> Training:
    """The same training without augmentation."""
    without = {name: field.default for name, field in Augmentation.model_fields.items()}
    return training.model_copy(update={**without, "mixup": 0.0, "cutmix": 0.0, "distill": None})


def ranges(examples: Dataset[Any]) -> tuple[list[float], list[float]]:
    """The least and the largest value of each channel; a channel of one value only is given some room."""
    least, most = zip(
        *((images.amin((0, 2, 3)), images.amax((0, 2, 3))) for images, _ in loader(examples, BATCH, 0)), strict=True
    )
    low = torch.stack(least).amin(0)
    high = torch.stack(most).amax(0)
    return low.tolist(), torch.where(high > low, high, low + 1).tolist()


def _best(
    model: nn.Module, held_out: Dataset[Any], how: Search, low: list[float], high: list[float], seed: int, log: Log
) -> list[SubPolicies]:
    """The policies with the lowest loss of those that a tree of Parzen estimators (TPE) tries."""
    optuna = _optuna()
    without = loss(model, held_out, lambda images: images, seed)
    if not math.isfinite(without):
        raise InputError(f"train: the loss of a fold is {without}; take a smaller learning_rate")
    names = [name for name in OPERATIONS if len(low) == 3 or name != "saturation"]  # grey has none

    def suggested(trial: Any, place: str) -> Operation:
        return Operation(
            name=trial.suggest_categorical(f"{place}.name", names),
            probability=trial.suggest_float(f"{place}.probability", 0, 1),
            magnitude=trial.suggest_float(f"{place}.magnitude", 0, 1),
        )

    def objective(trial: Any) -> float:
        subs = [[suggested(trial, f"{i}.{j}") for j in range(LENGTH)] for i in range(how.size)]
        tried.append(subs)
        return loss(model, held_out, applier(Policy(low=low, high=high, sub_policies=subs)), seed)

    tried: list[SubPolicies] = []
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, how.trials)
    ranked = sorted(study.trials, key=loss_of)
    best = loss_of(ranked[0])
    log(f"  loss {without:.4f} without augmentation, {best:.4f} by the best policy of {how.trials}")
    return [tried[trial.number] for trial in ranked[: how.top]]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError("policies are searched by optuna; pip install 'micronet-eval[train]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def loss_of(trial: Any) -> float:
    """Of a trial that failed, as its loss was no number, infinity."""
    return math.inf if trial.value is None else float(trial.value)


def loss(model: nn.Module, examples: Dataset[Any], change: Change, seed: int) -> float:
    """The mean cross entropy on augmented examples; each call with one seed draws the same."""
    model.eval()
    device, total, count = team().device, 0.0, 0
    torch.manual_seed(seed)
    with torch.no_grad():
        for images, labels in loader(examples, BATCH, seed):
            outputs = model(change(images.to(device)))
            total += cross_entropy(outputs, labels.to(device), reduction="sum").item()
            count += len(labels)
    return total / count
