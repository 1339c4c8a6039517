"""Whether the recipe of a submission makes that submission: it is run again, and what comes out is compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from micronet_eval import packing
from micronet_eval.errors import InputError
from micronet_eval.files import read_whole
from micronet_eval.recipe import compress
from micronet_eval.submission import MANIFEST, RECIPE, TABLE_LIMIT, WEIGHTS, Manifest, build, read_manifest


@dataclass(frozen=True)
class Difference:
    """A tensor of which the recipe makes another one: how many of its values differ, and by how much at most."""

    tensor: str
    values: int
    of: int
    largest: float


@dataclass(frozen=True)
class Reproduction:
    """`identical` says that the weights are the same bit for bit; `remarks` tell what else differs.

    `differences` are the tensors that differ, where both have them; `others` those that only one of the two has, or
    that have another shape.
    """

    identical: bool
    differences: tuple[Difference, ...] = ()
    others: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def reproduce(
    folder: str | Path,
    data: str | Path | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reproduction:
    """Runs the recipe of a submission again, in a folder of its own, and compares the weights bit for bit.

    Bit for bit can hold on one machine with one version of torch; elsewhere training rounds otherwise. Raises
    InputError where there is no recipe, or its data is missing.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.architecture.file is not None:
        raise InputError(
            f"{folder / MANIFEST}: field 'architecture.file': a recipe makes a registered architecture, by name, so "
            "that no recipe makes this submission"
        )
    before = packing.read(folder / WEIGHTS)
    try:
        text = read_whole(folder / RECIPE, TABLE_LIMIT)
    except OSError as error:
        why = f"{error.strerror}; only a submission with its recipe can be reproduced"
        raise InputError(f"{folder / RECIPE} cannot be read: {why}") from error
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        (made / RECIPE).write_bytes(text)
        try:
            compress(made / RECIPE, made / "made", data, log, progress=progress)
        except InputError as error:
            raise InputError(str(error).replace(f"{made / RECIPE}", f"{folder / RECIPE}")) from error
        after = packing.read(made / "made" / WEIGHTS)
        new = read_manifest(made / "made")
        remarks = _remarks(manifest, new)
        if packing.file_bytes(after) == packing.file_bytes(before):
            return Reproduction(True, remarks=remarks)
        one, other = _tensors(before, manifest, folder), _tensors(after, new, made / "made")
    shared = [name for name in one if name in other and one[name].shape == other[name].shape]
    return Reproduction(
        identical=False,
        differences=tuple(
            _difference(name, one[name], other[name]) for name in shared if not torch.equal(one[name], other[name])
        ),
        others=tuple(sorted({*one, *other} - set(shared))),
        remarks=remarks,
    )


def _remarks(one: Manifest, other: Manifest) -> tuple[str, ...]:
    """The fields of the manifest that are others."""
    fields = (name for name in Manifest.model_fields if getattr(one, name) != getattr(other, name))
    return tuple(f"{MANIFEST}: field {name!r} is another" for name in fields)


def _tensors(packed: packing.Packed, manifest: Manifest, folder: Path) -> dict[str, Tensor]:
    model: nn.Module = packing.unpack(packed, build(manifest.architecture, folder / MANIFEST))
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if not tensor.is_meta}


def _difference(name: str, one: Tensor, other: Tensor) -> Difference:
    apart = (one.double() - other.double()).abs()
    return Difference(name, int((apart > 0).sum()), one.numel(), float(apart.max()))
