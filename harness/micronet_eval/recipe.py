"""Recipes: ordered stages that turn a registered architecture into a submission.

```toml
task = "digits"
seed = 0
[architecture]
name = "wide-resnet"
[[stages]]
train = { epochs = 30, learning_rate = 0.002 }
[[stages]]
pruner = "low-rank"
parameters = 20_000
```

A stage can repeat others, until a target is reached or quality on held-out training data falls too low:

```toml
[[stages]]
[stages.rounds]
times = 10
quality = 0.97
[[stages.rounds.stages]]
pruner = "magnitude"
[[stages.rounds.stages]]
train = { epochs = 2, learning_rate = 0.001 }
```
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import safe_open
from safetensors.torch import save as safetensors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, Subset, TensorDataset

from micronet_eval import packing, plugins
from micronet_eval.augmentation import augmenter
from micronet_eval.errors import InputError
from micronet_eval.files import is_below_a_folder, locked, remove_temporaries, write_together
from micronet_eval.importing import load_state, read_state_dict
from micronet_eval.kept import KEPT, Kept
from micronet_eval.language import example_input, per_token, shares_of_clusters, steps
from micronet_eval.merge import BOTH, merged, without_batch_norm
from micronet_eval.opening import check_claims, open_submission
from micronet_eval.parallel import team
from micronet_eval.paths import mean_account
from micronet_eval.quality import measure
from micronet_eval.scoring import score as score_of
from micronet_eval.strategy import Context, Strategy, is_union, values_of
from micronet_eval.structure import copied
from micronet_eval.submission import (
    MANIFEST,
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
    manifest_bytes,
    read_toml,
)
from micronet_eval.task import METRICS, DataMissing, Task
from micronet_eval.trace import Example, trace, trace_each
from micronet_eval.training import LARGEST_BATCH, Ensemble, Log, Training, loader, logits_of, mix, train

NOISE_EXAMPLES = 256

TRAINED = "trained.safetensors"
"""The state dict of the architecture, as `train` writes it beside the submission."""

_RECIPE = "recipe"  # the key of its metadata that has the SHA-256 of what it was trained by


class Statistics(Table):
    """Estimates batch norm's running mean and variance anew, as plain averages over batches of training data."""

    batches: int = Field(gt=0)


class Target(Table):
    """What a model has to come down to: parameters, those that are not zero, operations at 32 bits, or the score."""

    parameters: int | None = Field(None, gt=0)
    nonzeros: int | None = Field(None, gt=0)
    operations: int | None = Field(None, gt=0)
    score: float | None = Field(None, gt=0)

    def reached(self, step: Step) -> bool:
        """Whether every figure that is given is reached."""
        figures = (step.parameters, step.nonzeros, step.mults + step.adds, step.score)
        wanted = (self.parameters, self.nonzeros, self.operations, self.score)
        pairs = [(figure, want) for figure, want in zip(figures, wanted, strict=True) if want is not None]
        return bool(pairs) and all(figure is not None and figure <= want for figure, want in pairs)


class Rounds(Table):
    """Repeats `stages` up to `times` times: until a target is reached, or while quality on held-out data is enough.

    The round after which quality falls below `quality` (rises above it, where lower is better) is undone.
    """

    times: int = Field(gt=0)
    until: Target = Target()
    quality: float | None = Field(None, ge=0)
    stages: list[Stage] = Field(min_length=1)


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
    rounds: Rounds | None = None

    @model_validator(mode="after")
    def _one(self) -> Stage:
        known, options = type(self).model_fields, [*(self.__pydantic_extra__ or {})]
        if options and not self.model_fields_set & set(known):
            raise ValueError(plugins.unknown("stage", options[0], known))
        if len(self.model_fields_set & set(known)) != 1:
            raise ValueError(f"a stage has exactly one of: {', '.join(known)}")
        if self.strategy_kind is None and options:
            raise ValueError(f"only a strategy has options, not: {', '.join(options)}")
        return self

    @property
    def strategy_kind(self) -> plugins.Kind | None:
        return next((kind for kind in plugins.STRATEGIES if getattr(self, kind) is not None), None)

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
    """recipe.toml. `data = "noise"` trains and calibrates on seeded normal noise, where the real data cannot be had.

    `validation` is the share of the training data that is held out: nothing is trained or calibrated on it, and quality
    is measured on it after every stage. Test data is never looked at. `start` is a folder that `train` wrote: the
    weights there are those that the stages begin with. Stages and processes count on from `seed`; numpy takes less than
    2^32.
    """

    task: str
    seed: int = Field(0, ge=0, lt=2**31)
    data: Literal["task", "noise"] = "task"
    validation: float = Field(0.0, ge=0, lt=1)
    batch_size: int = Field(32, gt=0, le=LARGEST_BATCH)
    start: str = ""
    architecture: Architecture
    stages: list[Stage] = Field(min_length=1)
    submission: About

    @model_validator(mode="after")
    def _quality_is_measured(self) -> Recipe:
        rounds = [stage.rounds for _, stage in named_stages(self.stages) if stage.rounds is not None]
        if not self.validation and any(r.quality is not None or r.until.score is not None for r in rounds):
            raise ValueError(
                "rounds that end by quality or score need a share of training data held out: validation = 0.1"
            )
        return self


_UNDONE = " (undone)"
"""Behind the name of a stage of a round that was taken back."""

Told = Callable[[int, int], None]
"""Called with the batches that are trained so far, and all that the recipe can take at most."""


def compress(
    path: str | Path,
    folder: str | Path,
    data: str | Path | None = None,
    log: Log = lambda line: None,
    resume: bool = False,
    progress: Told = lambda done, total: None,
) -> None:
    """Runs a recipe and writes the submission that comes out of it. The same recipe gives the same files.

    What it has done is kept in `folder` until it ends; `resume` goes on from there, and ends with the same files.
    Raises InputError where the recipe is wrong, the training data is missing, or there is nothing to resume.
    """
    path, root = Path(path), None if data is None else Path(data)
    _make(path, Path(folder), resume, lambda: _Run(path, root, log, progress))


def train_only(
    path: str | Path,
    folder: str | Path,
    data: str | Path | None = None,
    log: Log = lambda line: None,
    resume: bool = False,
    progress: Told = lambda done, total: None,
) -> None:
    """Runs a recipe that only trains; writes the submission, unquantized, and beside it the state dict.

    The latter is what other recipes `start` from. Else as `compress`.
    """

    path, root = Path(path), None if data is None else Path(data)

    def run() -> _Run:
        made = _Run(path, root, log, progress)
        for name, stage in named_stages(made.recipe.stages):
            if stage.strategy_kind is not None or stage.merge is not None:
                raise InputError(f"{path}: field '{name}': {stage} does not train; micronet-eval compress runs it")
        return made

    _make(path, Path(folder), resume, run, TRAINED)


def _make(path: Path, folder: Path, resume: bool, begin: Callable[[], _Run], state_dict: str = "") -> None:
    """Runs a recipe and writes what comes out of it; the `state_dict`, too, where it has a name."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder; name another one to write")
    if not is_below_a_folder(folder):
        raise InputError(f"{folder} cannot be made: a part of its path is a file; name another folder")
    run = begin()
    text = path.read_bytes()
    other = folder / RECIPE
    if other.exists() and not (folder / MANIFEST).exists() and other.read_bytes() != text:
        raise InputError(f"{other} is another recipe, whose place this one would take; name another folder by -o")
    try:
        with locked(folder) if team().first else nullcontext():
            for needed in filter(None, [run.recipe.start, *run.teachers]):
                if folder.resolve() == Path(needed).resolve():
                    raise InputError(f"{path} needs what lies in {folder}, where nothing may take its place")
            kept = Kept(folder / KEPT, text, resume)
            try:
                run.all(kept)
            except InputError:
                if kept.empty:  # nothing to go on from
                    kept.remove()
                raise
            if team().first:
                made_by = {_RECIPE: hashlib.sha256(text).hexdigest()}
                state = {state_dict: safetensors(_apart(run.model), made_by)} if state_dict else {}
                files = {RECIPE: text, **state, **_written(run)}
                remove_temporaries(folder, files)
                write_together(folder, files)
                kept.remove()
    except BrokenPipeError:  # whoever read what is printed has ended
        raise
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}; name another folder") from error
    team().wait()


def _apart(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as the format takes it: no tensor shares memory with another, as those of tied layers do."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}


def _written(run: _Run) -> dict[str, bytes]:
    """The files of the submission that a run came to; the manifest is the last."""
    recipe, about = run.recipe, run.recipe.submission
    packed = packing.pack(merged(run.model, run.example), build(recipe.architecture, run.path), run.example)
    manifest = Manifest(
        name=about.name,
        task=recipe.task,
        authors=about.authors,
        architecture=recipe.architecture,
        claims=about.claims,
        paths=about.paths,
        provenance=Provenance(note=about.note, data=recipe.data, steps=run.steps),
    )
    return {WEIGHTS: packing.file_bytes(packed), MANIFEST: manifest_bytes(manifest)}


def trained(recipe: str, folder: Path, data: Path | None = None) -> None:
    """Runs the stages of a recipe, given as text, and leaves what they came to in `folder`, whole or not at all.

    A recipe that begins with the same stages can resume from there. Raises InputError where the recipe is wrong.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as name:
        path = Path(name) / "recipe.toml"
        path.write_text(recipe, encoding="utf-8")
        _Run(path, data).all(Kept(Path(name) / KEPT, recipe.encode(), resume=False))
        try:
            (Path(name) / KEPT).rename(folder)
        except OSError:
            if not folder.exists():  # else another run was faster, with the same outcome
                raise


class _Run:
    """One run of a recipe. Stages that an earlier run has done are taken from what it kept.

    A structure is made again by applying its strategies again, in order; weights are what was kept. So nothing but
    tensors and numbers is ever read from disk.
    """

    def __init__(
        self,
        path: Path,
        data: Path | None,
        log: Log = lambda line: None,
        progress: Told = lambda done, total: None,
    ) -> None:
        self.path, self.progress = path, progress
        self.log = log if team().first else lambda line: None
        self.recipe = recipe = read_toml(path, Recipe)
        try:
            self.task: Task = plugins.lookup("task", recipe.task)
            _check(recipe, self.task)
            self.training, self.held_out = data_of(recipe, self.task, data)
            teachers = _teachers(recipe).items()
            self.teachers = {folder: _teacher(folder, place, self.task, recipe) for folder, place in teachers}
        except (InputError, DataMissing) as error:
            raise InputError(f"{path}: {error}") from error
        if recipe.architecture.file is not None:
            raise InputError(
                f"{path}: field 'architecture.file': a recipe trains a registered architecture, by name; weights for a "
                "model.py are packed by micronet-eval import"
            )
        torch.manual_seed(recipe.seed)
        self.model, about = build(recipe.architecture, path, weights=True), recipe.submission
        check_claims(about.claims, about.paths, self.task, self.model, f"{path}: field 'submission.")
        if recipe.start:
            try:
                _start(self.model, recipe)
            except InputError as error:
                raise InputError(f"{path}: field 'start': {error}") from error
        self.teacher: nn.Module | None = None  # the uncompressed model
        self.distills = any(s.train and s.train.distill for _, s in named_stages(recipe.stages))
        self.trained = 0
        self.batches = batches_of(recipe.stages, len(self.training))  # type: ignore[arg-type]
        try:
            self.example = example_input(self.task, self.model)
            self.steps = [self._step("architecture")]
        except InputError as error:
            raise InputError(f"{path}: field 'architecture': {error}") from error
        self.log(_told(self.steps[0]))

    def all(self, kept: Kept) -> None:
        """Runs all stages, and keeps what they come to."""
        self.kept = kept
        self.stages("stages", self.recipe.stages)

    def stages(self, name: str, stages: Sequence[Stage], prefix: str = "") -> None:
        """Runs stages one after the other, rounds among them."""
        for i, stage in enumerate(stages):
            if stage.rounds is None:
                self.one(f"{name}.{i}", stage, prefix)
            else:
                self.rounds(f"{name}.{i}.rounds.stages", stage.rounds, prefix)

    def rounds(self, name: str, rounds: Rounds, prefix: str = "") -> None:
        if rounds.until.reached(self._last):
            return
        for number in range(1, rounds.times + 1):
            before, here = copied(self.model) if rounds.quality is not None else None, len(self.steps)
            self.stages(name, rounds.stages, f"{prefix}round {number}: ")
            last = self._last
            if rounds.quality is not None and before is not None and last.quality is not None:
                lower_is_better = METRICS[self.task.metric].lower_is_better
                if last.quality > rounds.quality if lower_is_better else last.quality < rounds.quality:
                    self.model = before
                    self.steps[here:] = [
                        step.model_copy(update={"stage": f"{step.stage}{_UNDONE}"}) for step in self.steps[here:]
                    ]
                    self.log(f"round {number} is undone: {METRICS[self.task.metric].show(last.quality)} held out")
                    return
            if rounds.until.reached(last):
                return

    @property
    def _last(self) -> Step:
        """What the model is now: the last step that was not taken back."""
        return next(step for step in reversed(self.steps) if not step.stage.endswith(_UNDONE))

    def one(self, name: str, stage: Stage, prefix: str = "") -> None:
        """Runs one stage, or takes from what was kept what it came to."""
        number = len(self.steps)
        seed = self.recipe.seed + number
        torch.manual_seed(seed)
        strategy = strategy_of(stage, name)
        batches = loader(self.training, self.recipe.batch_size, seed)
        context = Context(self.example, batches, seed, plugins.formulas())
        if strategy is not None and self.teacher is None and self.distills:
            self.teacher = copied(self.model)
        trained = self.trained
        try:
            saved = self.kept.step(number)
            if saved is None or strategy is not None or stage.merge is not None:
                self.model = self._apply(stage, strategy, context)
            if saved is not None:
                self.model.load_state_dict(self.kept.weights(number))
                self.steps.append(saved)
            else:
                self.steps.append(self._step(f"{prefix}{stage}"))
                self.kept.keep(number, self.model, self.steps[-1])
        except InputError as error:
            raise InputError(f"{self.path}: field '{name}': {error}") from error
        self.trained = trained + batches_of([stage], len(self.training))  # type: ignore[arg-type]
        self.log(_told(self.steps[-1]))

    def _apply(self, stage: Stage, strategy: Strategy | None, context: Context) -> nn.Module:
        if strategy is not None:
            return strategy.apply(self.model, context)
        if stage.train is not None:
            epochs = self.kept.epochs(len(self.steps))
            return train(
                self.model,
                stage.train,
                context,
                self.log,
                self._teacher(stage.train),
                epochs,
                self._done,
                self.held_out,
            )
        if stage.statistics is not None:
            return estimate_statistics(self.model, stage.statistics, context)
        return merged(self.model, context.example_input, BOTH if stage.merge == "batch-norm" else ("backward",))

    def _teacher(self, training: Training) -> nn.Module | None:
        if training.distill is None:
            return None
        folders = training.distill.folders
        return Ensemble([self.teachers[folder] for folder in folders]) if folders else self.teacher

    def _done(self, batches: int) -> None:
        self.trained += batches
        self.progress(self.trained, self.batches)

    def _step(self, name: str) -> Step:
        for path, weight in self.model.named_parameters():
            if not bool(weight.isfinite().all()):
                raise InputError(f"the model's {path} is not finite any more; train with a lower learning rate")
        # Batch norm as the two values a channel that it is; where it may be merged is for the recipe to say.
        model = without_batch_norm(copied(self.model))
        counted = mean_account(trace(model, self.example), plugins.formulas(), freebie=False)
        quality = score = None
        if (held_out := self.held_out) is not None:
            task = replace(self.task, dataset=lambda root, split: held_out)
            quality = measure(self.model, task, None).measured
            score = _score(merged(self.model, self.example), self.example, task)
        return Step(
            stage=name,
            parameters=counted.storage.parameters,
            nonzeros=counted.storage.nonzeros,
            mults=int(counted.math.mults),
            adds=int(counted.math.adds),
            score=score,
            quality=quality,
        )


def _score(model: nn.Module, example: Example, task: Task) -> float:
    """As `evaluate` gives it; of a language model by how frequent tokens are in the task's data."""
    if task.metric == "perplexity":
        each, (shares, _) = steps(model, task.tokens), shares_of_clusters(model, task, None, None)
        recorded = trace_each(model, each.inputs)
        whole = per_token(model, recorded, each, task.tokens, plugins.formulas(), shares)
    else:
        whole = mean_account(trace(model, example), plugins.formulas())
    return score_of(whole, task.storage, task.math).total


def _check(recipe: Recipe, task: Task) -> None:
    """Raises InputError where a stage cannot run, as far as that is known before the first one is."""
    example = torch.zeros(1, *task.input_shape, dtype=torch.int64 if task.metric == "perplexity" else torch.float32)
    compressed = False
    for name, stage in named_stages(recipe.stages):
        compressed = strategy_of(stage, name) is not None or compressed
        if (training := stage.train) is None:
            continue
        try:
            mix(augmenter(training)(example), training)
            if training.distill is not None and not training.distill.folders and not compressed:
                raise InputError(
                    "train: distill learns from the uncompressed model; compress it first, or name a teacher"
                )
        except InputError as error:
            raise InputError(f"field '{name}': {error}") from error


def _teachers(recipe: Recipe) -> dict[str, str]:
    """The folders of submissions that some stage learns from, each with the place of the first such stage."""
    each = ((place, stage.train.distill) for place, stage in named_stages(recipe.stages) if stage.train is not None)
    found = [(folder, place) for place, distill in each if distill is not None for folder in distill.folders]
    return dict(reversed(found))


def _teacher(folder: str, place: str, task: Task, recipe: Recipe) -> nn.Module:
    """The model in a submission's folder. By the recipe there, if there is one, it must not know what is held out."""
    try:
        opened = open_submission(folder)
        if opened.task.name != task.name:
            raise InputError(f"the teacher in {folder} was trained for the task {opened.task.name}, not {task.name}")
        if recipe.validation and (Path(folder) / RECIPE).exists():
            _check_unseen(folder, read_toml(Path(folder) / RECIPE, Recipe), recipe)
    except InputError as error:
        raise InputError(f"field '{place}': teacher: {error}") from error
    return opened.model


def _start(model: nn.Module, recipe: Recipe) -> None:
    """Loads what `train` wrote. What is held out here must not have been trained on there."""
    folder = Path(recipe.start)
    load_state(model, read_state_dict(folder / TRAINED), folder / TRAINED, recipe.architecture.name)
    if not recipe.validation:
        return
    there = read_toml(folder / RECIPE, Recipe)
    with safe_open(folder / TRAINED, framework="pt") as file:
        made_by = (file.metadata() or {}).get(_RECIPE)
    if made_by not in (None, hashlib.sha256((folder / RECIPE).read_bytes()).hexdigest()):
        raise InputError(
            f"{folder / RECIPE} is not what {TRAINED} there was trained by, and what that has seen is not known; "
            "train it again in a folder of its own"
        )
    _check_unseen(recipe.start, there, recipe)


def _check_unseen(folder: str, there: Recipe, recipe: Recipe) -> None:
    """Raises InputError where what the recipe holds out was trained on by the one in another folder."""
    if (there.task, there.data) != (recipe.task, recipe.data):  # other examples, but for those of what it came from
        if known := sorted({there.start, *_teachers(there)} - {""}):
            raise InputError(
                f"{folder} was trained on other data from {', '.join(known)}, which may have seen what is held out "
                "here; name one that had no start and no teacher"
            )
    elif there.seed != recipe.seed or there.validation < recipe.validation:
        raise InputError(
            f"{folder} was trained on examples that are held out here; hold them out there, too: "
            f"seed = {recipe.seed} and validation = {recipe.validation} in both recipes"
        )


def named_stages(stages: Sequence[Stage], prefix: str = "stages") -> Iterator[tuple[str, Stage]]:
    """Every stage with its place in the recipe, those inside of rounds, too."""
    for i, stage in enumerate(stages):
        yield f"{prefix}.{i}", stage
        if stage.rounds is not None:
            yield from named_stages(stage.rounds.stages, f"{prefix}.{i}.rounds.stages")


def batches_of(stages: Sequence[Stage], examples: int) -> int:
    """The batches that the stages train on at most."""
    total = 0
    for stage in stages:
        if stage.train is not None:
            total += stage.train.epochs * -(-examples // stage.train.batch_size)
        if stage.rounds is not None:
            total += stage.rounds.times * batches_of(stage.rounds.stages, examples)
    return total


def strategy_of(stage: Stage, place: str) -> Strategy | None:
    """The strategy of a stage with its options; None where it has none. Raises InputError that names the `place`."""
    kind = stage.strategy_kind
    if kind is None:
        return None
    return configured(kind, getattr(stage, kind), stage.__pydantic_extra__ or {}, f"field '{place}'")


def configured(kind: plugins.Kind, name: str, options: Mapping[str, Any], place: str) -> Strategy:
    """A strategy with options. Raises InputError that begins with the `place` where one is unknown or out of range."""
    try:
        strategy: type[Strategy] = plugins.lookup(kind, name)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    try:
        return strategy(**options)
    except ValidationError as error:
        fault = error.errors()[0]
        option = ".".join(str(part) for part in fault["loc"])
        field = strategy.model_fields.get(str(fault["loc"][0])) if fault["loc"] else None
        of_type = fault["type"].endswith(("_type", "_parsing", "_error"))
        if field is not None and of_type and is_union(field.annotation):  # pydantic names the type that it tried first
            option, fault["msg"] = str(fault["loc"][0]), f"Input should be {values_of(field.annotation)}"
        if fault["type"] == "extra_forbidden":
            unknown = plugins.unknown("option", option, strategy.model_fields)
            raise InputError(f"{place}: {kind} {name}: {unknown}") from error
        # what options say together has no option of its own
        told = f"option {option!r}: {fault['msg']}" if option else fault["msg"].removeprefix("Value error, ")
        raise InputError(f"{place}: {kind} {name}: {told}") from error


def _told(step: Step) -> str:
    told = (
        f"{step.stage}: {step.parameters:,} parameters, {step.nonzeros:,} non-zero, "
        f"{step.mults + step.adds:,} operations"
    )
    if step.quality is not None and step.score is not None:
        told += f"; held out {step.quality:.4f}, score {step.score:.5f}"
    return told


def data_of(recipe: Recipe, task: Task, root: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Training data, and the part of it that is held out: drawn by the seed; of a stream of text its end."""
    whole = _training_data(recipe, task, root)
    examples = len(whole)  # type: ignore[arg-type]
    held_out = round(recipe.validation * examples)
    if not examples:
        raise InputError(f"task {recipe.task} has no training data; look after the folder of --data")
    if not recipe.validation:
        return whole, None
    if not 0 < held_out < examples:
        taken = f"{held_out:,}" if held_out else "none"
        raise InputError(
            f"field 'validation': {recipe.validation} of {examples:,} examples holds out {taken}; take a share that "
            "leaves some on both sides"
        )
    if task.metric == "perplexity":
        order = list(range(examples))
    else:
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    return Subset(whole, order[:-held_out]), Subset(whole, order[-held_out:])


def _training_data(recipe: Recipe, task: Task, root: Path | None) -> Dataset[Any]:
    if recipe.data == "task":
        return task.dataset(root, "train")
    if task.metric == "perplexity":
        raise InputError("field 'data': noise stands in for images, not for text; use data = \"task\"")
    generator = torch.Generator().manual_seed(recipe.seed)
    inputs = torch.randn(NOISE_EXAMPLES, *task.input_shape, generator=generator)
    return TensorDataset(inputs, torch.zeros(NOISE_EXAMPLES, dtype=torch.int64))


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
            logits_of(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
