"""What every strategy must hold, as checks that a plugin's tests run: `check_pruner(MyPruner)` and its siblings.

The checks use small networks with random weights and made-up training data, so they take seconds. Each is a function
that raises AssertionError with one sentence on what is wrong. `checks(strategy)` gives them one by one, for
pytest.mark.parametrize.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from micronet_eval import packing, plugins
from micronet_eval.errors import InputError
from micronet_eval.merge import merged
from micronet_eval.paths import mean_account
from micronet_eval.scoring import Account
from micronet_eval.strategy import Context, Pruner, Quantizer, Sparsifier, Strategy
from micronet_eval.trace import trace
from micronet_eval.training import Training, loader, train

CLASSES, EXAMPLES, SHAPE = 5, 40, (2, 12, 12)

Check = Callable[[], None]


# --- the networks -----------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """A convolution, a block with a branch around it, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)
        )
        self.classifier = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def plain() -> nn.Module:
    """Two convolutions with batch norm, a linear classifier."""
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def grouped() -> nn.Module:
    """A depthwise-separable convolution between two others, one of them in groups."""
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def linear() -> nn.Module:
    """Three linear layers and no convolution."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(288, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, CLASSES)
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "residual": _Residual,
    "grouped": grouped,
    "linear": linear,
}
MUST_WORK = "plain"
"""The network that no strategy may refuse. Of the others it may say by an InputError that they are none for it."""


def _made(net: str) -> nn.Module:
    """The network in evaluation mode, with seeded weights and with batch norm statistics that are no identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = NETS[net]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                nn.init.uniform_(module.weight, 0.5, 2)
    return model.eval()


def context(seed: int = 0) -> Context:
    """Made-up training data, of which half of each class is alike, so that something can be learned."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, *SHAPE, generator=generator)
    labels = torch.arange(EXAMPLES) % CLASSES
    inputs = centres[labels] + 0.5 * torch.randn(EXAMPLES, *SHAPE, generator=generator)
    data = loader(TensorDataset(inputs, labels), 10, seed)
    return Context(torch.zeros(1, *SHAPE), data, seed, plugins.formulas())


# --- applying ---------------------------------------------------------------------------------------------------------


def _applied(strategy: Strategy, net: str, model: nn.Module | None = None, seed: int = 0) -> nn.Module | None:
    """The compressed network; None where the strategy refuses it."""
    model = _made(net) if model is None else model
    with torch.random.fork_rng(devices=[]), _no_test_data():
        torch.manual_seed(seed)
        try:
            result = strategy.apply(model, context(seed))
        except InputError as error:
            assert net != MUST_WORK, f"refuses the {net} network: {error}"
            assert str(error).strip(), "refuses a network without a word"
            return None
    assert isinstance(result, nn.Module), f"apply returned {type(result).__name__}, no module"
    return result


@contextmanager
def _no_test_data() -> Iterator[None]:
    """Every task's test data is an error."""
    registered = plugins.registered

    def guarded(kind: plugins.Kind) -> Any:
        found = registered(kind)
        if kind != "task":
            return found
        return {
            name: replace(entry, thing=replace(entry.thing, dataset=partial(_training_only, entry.thing.dataset)))
            for name, entry in found.items()
        }

    with patch.object(plugins, "registered", guarded):
        yield


def _training_only(dataset: Callable[..., Any], root: Path | None, split: str) -> Any:
    assert split != "test", "asks a task for its test data"
    return dataset(root, split)


def _logits(model: nn.Module) -> Tensor:
    inputs = torch.cat([x for x, _ in context().training_data])
    with torch.no_grad():
        return model.eval()(inputs)  # type: ignore[no-any-return]


def _cost(model: nn.Module) -> Account:
    example = context().example_input
    return mean_account(trace(merged(model, example), example), plugins.formulas(), freebie=False)


def _widths(account: Account) -> tuple[int, int]:
    """The widest value that is stored, and the widest that is multiplied."""
    stored = (s.format.code_bits for s in account.stored if not s.is_overhead)
    multiplied = (max(x.input_bits, x.weight_bits) for x in account.layers if x.mults)
    return max(stored, default=0), max(multiplied, default=0)


# --- the checks -------------------------------------------------------------------------------------------------------


def documented(strategy: Strategy) -> None:
    """A first line for the list, and a description of every option."""
    kind = type(strategy)
    assert (kind.__doc__ or "").strip(), f"{kind.__name__} has no docstring; its first line is shown in lists"
    for name, field in kind.model_fields.items():
        assert field.description, f"option {name!r} has no description; write Field(..., description=...)"


def refuses_unknown_options(strategy: Strategy) -> None:
    """A misspelt option is an error, not ignored."""
    try:
        type(strategy)(**{**strategy.model_dump(), "no_such_option": 1})
    except ValidationError:
        return
    raise AssertionError(
        "takes an option that it does not have; derive from Pruner, Sparsifier or Quantizer as they are"
    )


def refuses_wrong_options(strategy: Strategy) -> None:
    """An option of the wrong type is an error."""
    for name in type(strategy).model_fields:
        try:
            type(strategy)(**{**strategy.model_dump(), name: object()})
        except ValidationError:
            continue
        raise AssertionError(f"option {name!r} takes any value; give it a type")


def is_deterministic(strategy: Strategy, net: str) -> None:
    """The same model, data and seed give the same result, whatever ran before."""
    first = _applied(strategy, net)
    torch.rand(7)
    second = _applied(strategy, net)
    if first is None or second is None:
        assert first is second, f"refuses the {net} network only sometimes"
        return
    assert torch.equal(_logits(first), _logits(second)), f"gives another result each time, on the {net} network"


def leaves_its_input_alone(strategy: Strategy, net: str) -> None:
    """The model that it was given has the same modules, weights and mode afterwards."""
    model = _made(net)
    weights = copy.deepcopy(model.state_dict())
    modules = {path: (id(module), module.training) for path, module in model.named_modules()}
    before = _logits(model)
    _applied(strategy, net, model)
    assert {p: (id(m), m.training) for p, m in model.named_modules()} == modules, f"changes the {net} network itself"
    assert all(p.requires_grad for p in model.parameters()), f"freezes parameters of the {net} network itself"
    after = model.state_dict()
    same = set(after) == set(weights) and all(torch.equal(after[name], weights[name]) for name in weights)
    assert same, f"changes weights of the {net} network itself; copy it first (structure.copied)"
    assert torch.equal(_logits(model), before), f"changes what the {net} network computes (a hook?)"


def counts_cheaper(strategy: Strategy, net: str) -> None:
    """The result costs less: fewer parameters (pruner), fewer non-zero ones (sparsifier), fewer bits (quantizer)."""
    result = _applied(strategy, net)
    if result is None:
        return
    before, after = _cost(_made(net)), _cost(result)
    measure = {"pruner": "parameters", "sparsifier": "nonzeros", "quantizer": "bits"}[strategy.kind]
    one, other = getattr(before.storage, measure), getattr(after.storage, measure)
    assert other < one, f"the {net} network has {other:,} {measure} afterwards, {one:,} before"
    if strategy.kind == "quantizer":
        narrow = min(s.format.code_bits for s in after.stored if not s.is_overhead) < 32
        assert narrow or _widths(after) < _widths(before), f"nothing in the {net} network is narrower than 32 bits"
    if strategy.kind == "sparsifier":
        assert after.storage.parameters <= before.storage.parameters, f"adds parameters to the {net} network"
    score = after.storage.bits / before.storage.bits + after.math.ops32 / before.math.ops32
    assert score < 2, f"the {net} network scores {score:.4g} relative to itself before, which is no gain"


def survives_packing(strategy: Strategy, net: str) -> None:
    """The result is written into a file and read back with the same logits."""
    result = _applied(strategy, net)
    if result is None:
        return
    example = context().example_input
    result = merged(result, example)
    for parameter in result.parameters():  # convolutions sum up in another order where strides are unusual
        parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype).copy_(parameter)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        try:
            packing.write(packing.pack(result, NETS[net](), example), file)
            unpacked = packing.unpack(packing.read(file), NETS[net]())
        except InputError as error:
            raise AssertionError(f"the {net} network cannot be packed afterwards: {error}") from error
    same = torch.equal(_logits(unpacked), _logits(result))
    assert same, f"the {net} network computes something else after it was packed and unpacked"


def holds_while_trained(strategy: Strategy, net: str) -> None:
    """Training goes on after it, reaches the weights, and leaves zeros zero and values on their grid."""
    result = _applied(strategy, net)
    if result is None:
        return
    before, cost = _logits(result), _cost(result)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            train(result, Training(epochs=3, learning_rate=0.01, batch_size=10), context(), log=lambda line: None)
        except RuntimeError as error:
            raise AssertionError(f"the {net} network cannot be trained afterwards: {error}") from error
    assert not torch.equal(_logits(result), before), f"no gradient reaches the weights of the {net} network"
    after = _cost(result)
    if strategy.kind == "sparsifier":
        zeros = after.storage.nonzeros <= cost.storage.nonzeros
        assert zeros, f"zeros of the {net} network do not last; hold them with structure.Mask"
    if strategy.kind == "quantizer":
        assert _widths(after) <= _widths(cost), f"the {net} network leaves its grid while it is trained"


WITHOUT_NET = (documented, refuses_unknown_options, refuses_wrong_options)
ON_EACH_NET = (is_deterministic, leaves_its_input_alone, counts_cheaper, survives_packing, holds_while_trained)


def checks(strategy: Strategy | type[Strategy]) -> list[tuple[str, Check]]:
    """All checks of a strategy with their names. A class is made with its defaults."""
    if isinstance(strategy, type):
        required = [name for name, field in strategy.model_fields.items() if field.is_required()]
        named = ", ".join(required)
        assert not required, f"give an instance: {strategy.__name__} has options without a default: {named}"
        strategy = strategy()
    found: list[tuple[str, Check]] = [(check.__name__, partial(check, strategy)) for check in WITHOUT_NET]
    return found + [(f"{c.__name__}-{net}", partial(c, strategy, net)) for c in ON_EACH_NET for net in NETS]


def _check(strategy: Strategy | type[Strategy], kind: str) -> None:
    assert getattr(strategy, "kind", None) == kind, f"{strategy!r} is no {kind}"
    for _, check in checks(strategy):
        check()


def check_pruner(pruner: Pruner | type[Pruner]) -> None:
    """Raises AssertionError for the first thing that a pruner does not hold."""
    _check(pruner, "pruner")


def check_sparsifier(sparsifier: Sparsifier | type[Sparsifier]) -> None:
    """Raises AssertionError for the first thing that a sparsifier does not hold."""
    _check(sparsifier, "sparsifier")


def check_quantizer(quantizer: Quantizer | type[Quantizer]) -> None:
    """Raises AssertionError for the first thing that a quantizer does not hold."""
    _check(quantizer, "quantizer")


__all__ = ["NETS", "check_pruner", "check_quantizer", "check_sparsifier", "checks", "context"]
