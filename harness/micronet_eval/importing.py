"""From a state dict that somebody else trained to a submission: loaded, batch norm merged, packed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from micronet_eval import packing
from micronet_eval.bounds import bounded
from micronet_eval.errors import InputError
from micronet_eval.files import LARGEST, check_file, locked, read_whole, write_together
from micronet_eval.isolation import AUTO, Isolation
from micronet_eval.language import example_input
from micronet_eval.merge import merged
from micronet_eval.submission import MANIFEST, RECIPE, TABLE_LIMIT, WEIGHTS, build, read_manifest, task_of


def import_weights(folder: str | Path, path: str | Path, output: str | Path, isolation: Isolation = AUTO) -> None:
    """Writes the submission that the submission.toml in `folder` describes, with the weights of a state dict.

    The state dict has the architecture's names, or others that the architecture translates when it is loaded (by
    torch's `register_load_state_dict_pre_hook`). Raises InputError where it does not fit, or is none, SubmissionError
    where the submission's code fails, or its architecture takes more time or memory than it may.
    """
    with bounded(isolation.limits.evaluation, str(folder)):
        _import(Path(folder), Path(path), Path(output), isolation)


def _import(folder: Path, path: Path, output: Path, isolation: Isolation) -> None:
    manifest = read_manifest(folder)
    task, architecture = task_of(manifest, folder / MANIFEST), manifest.architecture
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder; name another one to write")
    if (output / RECIPE).exists():
        raise InputError(f"{output / RECIPE} does not make these weights; remove it, or name another folder")
    model = build(architecture, folder / MANIFEST, True, isolation)
    load_state(model, read_state_dict(path), path, architecture.name)
    try:
        example = example_input(task, model)
    except InputError as error:
        raise InputError(f"{folder / MANIFEST}: field 'architecture': {error}") from error
    try:
        plain = build(architecture, folder / MANIFEST, isolation=isolation)
        packed = packing.pack(merged(model, example), plain, example)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    try:
        code = [] if architecture.file is None else [architecture.file]
        with locked(output):
            write_together(
                output,
                {name: read_whole(folder / name, TABLE_LIMIT) for name in code}
                | {WEIGHTS: packing.file_bytes(packed), MANIFEST: read_whole(folder / MANIFEST, TABLE_LIMIT)},
            )
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}; name another folder") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch.save without code (`weights_only`), by name.

    Raises InputError where it cannot be read as such, or holds complex numbers, which torch would load by halves.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: name a state dict, a .safetensors file or one written by torch.save")
    check_file(path, LARGEST)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of files that then turn out to be damaged
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch and safetensors raise many kinds
        why = "it is damaged, or holds more than tensors; save model.state_dict() alone"
        raise InputError(f"{path} cannot be read as a state dict: {why}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, no state dict; save model.state_dict()")
    if wrong := [name for name, tensor in state.items() if not isinstance(name, str) or not isinstance(tensor, Tensor)]:
        raise InputError(f"{path} is no state dict: {wrong[0]!r} names no tensor; save model.state_dict()")
    if wrong := [name for name, tensor in state.items() if tensor.is_complex()]:
        raise InputError(f"{path}: tensor {wrong[0]!r} is complex, weights are real; save its parts as two tensors")
    return state


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path, architecture: str) -> None:
    """Loads a state dict, which may lack all but one of the names of tied parameters.

    Raises InputError that names its `path` where it does not fit the architecture.
    """
    try:
        keys = model.load_state_dict(state, strict=False)
    except Exception as error:  # shapes, or whatever an architecture's translation raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise InputError(f"{path} does not fit the architecture {architecture!r}: {reason}") from error
    places = model.state_dict(keep_vars=True)
    loaded = {id(place) for name, place in places.items() if name not in keys.missing_keys}
    missing = [name for name in keys.missing_keys if id(places.get(name)) not in loaded]
    _check_values(places, state, path)
    faults = [
        f"{what} {len(names)} tensors, the first is {names[0]!r}"
        for what, names in (
            ("it lacks", [name for name in missing if not name.endswith("num_batches_tracked")]),
            ("the architecture has no place for", keys.unexpected_keys),
        )
        if names
    ]
    if faults:
        raise InputError(f"{path} does not fit the architecture {architecture!r}: {'; '.join(faults)}")


def _check_values(places: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Raises InputError where a tensor has values that one of the model's dtype cannot be; floats may be rounded."""
    for name, given in state.items():
        place = places.get(name)
        if place is None or place.dtype == given.dtype or (place.is_floating_point() and given.is_floating_point()):
            continue
        if not torch.equal(place.detach().to(given.dtype), given):
            raise InputError(f"{path}: tensor {name!r} has values that {place.dtype} of the architecture cannot be")
