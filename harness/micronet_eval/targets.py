"""What `micronet-eval count` counts: a model by its name, and the shapes of its inputs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from micronet_eval.errors import InputError, SubmissionError
from micronet_eval.evaluation import Report, score
from micronet_eval.plugins import unknown
from micronet_eval.rulesets import DEFAULT
from micronet_eval.structure import without_weights
from micronet_eval.trace import Example


def count(
    target: str,
    *inputs: str,
    task: str | None = None,
    shares: Mapping[str, float] | None = None,
    ruleset: str = DEFAULT,
    cross_check: bool = False,
) -> Report:
    """What a model costs that `target` names (`build`), for one example of the `inputs` (`example`); as `score`."""
    report = score(build(target), example(inputs), task, shares, ruleset=ruleset, cross_check=cross_check)
    return report.model_copy(update={"submission": target})


# --- models -----------------------------------------------------------------------------------------------------------


def build(target: str) -> nn.Module:
    """The module that `target` names, without any weights where that can be.

    Raises InputError where there is no such model, SubmissionError where somebody's code fails.
    """
    library, _, name = target.partition(":")
    if not library or not name or library.startswith("."):
        raise InputError(
            f"{target!r} names no model; write torchvision:NAME, timm:NAME, transformers:CLASS, "
            "or package.module:FUNCTION"
        )
    return LIBRARIES[library](name) if library in LIBRARIES else _function(target, library, name)


def torchvision_model(name: str) -> nn.Module:
    """A registered model of torchvision, quantizable ones in floating point."""
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise InputError(unknown("torchvision model", name, known))
    options = {"weights": None}
    if "weights_backbone" in _arguments(models.get_model_builder(name)):
        options["weights_backbone"] = None
    return weightless(lambda: models.get_model(name, **options))


def timm_model(name: str) -> nn.Module:
    """A registered model of timm."""
    timm = _installed("timm")
    known = timm.list_models()
    if name not in known:
        raise InputError(unknown("timm model", name, known))
    return weightless(lambda: timm.create_model(name, pretrained=False))


def transformers_model(name: str) -> nn.Module:
    """A class of Hugging Face transformers with the default configuration of its kind."""
    kind = getattr(_installed("transformers"), name, None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module) or getattr(kind, "config_class", None) is None:
        raise InputError(f"transformers has no model class {name!r}; write for example transformers:BertModel")
    return weightless(lambda: kind(kind.config_class()))  # type: ignore[attr-defined]


LIBRARIES: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": torchvision_model,
    "timm": timm_model,
    "transformers": transformers_model,
}


def weightless(builder: Callable[[], nn.Module]) -> nn.Module:
    """What `builder` builds, on the meta device; with real weights where it computes with tensors on its way."""
    try:
        with without_weights():
            return builder()
    except (NotImplementedError, RuntimeError):
        return builder()


def _arguments(function: Callable[..., object]) -> set[str]:
    import inspect

    return set(inspect.signature(function).parameters)


def _installed(library: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise InputError(f"{library} is not installed; pip install {library}") from error


def _function(target: str, module: str, name: str) -> nn.Module:
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        file = module.removesuffix(".py").replace("/", ".")
        mend = f"; write {file}:{name}" if file != module else ""
        raise InputError(f"cannot find {target!r}: {error}{mend}") from error
    except Exception as error:  # it is somebody's code
        raise SubmissionError(f"{module} failed: {type(error).__name__}: {error}") from error
    if isinstance(function, nn.Module):
        raise InputError(f"{target} is a module; name a function that returns it")
    try:
        model = function()
    except Exception as error:  # it is somebody's code
        raise SubmissionError(f"{target} failed: {type(error).__name__}: {error}") from error
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{target} is a TorchScript module, whose operations cannot be traced; give the original module"
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"{target} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


# --- inputs -----------------------------------------------------------------------------------------------------------


def example(inputs: Sequence[str]) -> Example:
    """Zeros for inputs written as SHAPE, SHAPE:DTYPE or NAME=SHAPE:DTYPE, for example 1x16:int64.

    Several are given to the model in order, or by the names of its arguments. Raises InputError where one is no shape.
    """
    named: dict[str, Tensor] = {}
    for text in inputs:
        name, equals, shape = text.rpartition("=")
        if bool(equals) != ("=" in inputs[0]) or (equals and (not name.isidentifier() or name in named)):
            raise InputError(f"--input {text!r}: give all inputs by order, or each once by the name of an argument")
        named[name if equals else str(len(named))] = _zeros(text, shape)
    return named if "=" in inputs[0] else tuple(named.values())


def _zeros(text: str, shape: str) -> Tensor:
    sizes, colon, dtype = shape.partition(":")
    kind = getattr(torch, dtype, None) if colon else torch.float32
    if not isinstance(kind, torch.dtype):
        raise InputError(f"--input {text!r}: {dtype!r} is no dtype; write one like int64 or bfloat16")
    try:
        numbers = tuple(int(size) for size in sizes.split("x"))
        if min(numbers) < 1:
            raise ValueError
        return torch.zeros(numbers, dtype=kind, device="meta")  # only its shape matters, however large
    except (ValueError, RuntimeError, TypeError):  # torch raises the latter two for more elements than it can number
        raise InputError(f"--input {text!r} is no shape; write it like 1x3x224x224 or 1x16:int64") from None
