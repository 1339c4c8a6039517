"""What a run of a recipe keeps of what it has done, so that it goes on after it was killed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from micronet_eval.errors import InputError
from micronet_eval.files import write_whole
from micronet_eval.parallel import team
from micronet_eval.submission import WEIGHTS, Step
from micronet_eval.training import save

KEPT = ".kept"
"""The folder, inside of the one that is written, with what a run needs to go on after it was killed."""

MARK = "recipe.sha256"
"""The file in it that says which recipe may resume."""


class Kept:
    """For each stage the weights and the step, and the last epoch of training. Of several processes one writes."""

    def __init__(self, folder: Path, recipe: bytes, resume: bool) -> None:
        self.folder, mark = folder, folder / MARK
        digest = hashlib.sha256(recipe).hexdigest()
        if resume and not mark.exists():
            told = "is finished, and" if (folder.parent / WEIGHTS).exists() else "has no .kept:"
            raise InputError(f"{folder.parent} {told} there is nothing to resume; run without --resume")
        if resume and mark.read_bytes() != digest.encode():
            raise InputError(f"{folder} was kept by another recipe; run that one, or remove {folder} to begin anew")
        if not resume:
            if mark.exists() and not self.empty:
                raise InputError(
                    f"{folder} has what a run did that has not ended; go on by --resume, or remove it to begin anew"
                )
            if team().first and folder.exists():
                shutil.rmtree(folder)
            self.mark(folder, recipe)
        team().wait()

    @staticmethod
    def mark(folder: Path, recipe: bytes) -> None:
        """Says which recipe may resume from `folder`."""
        if not team().first:
            return
        write_whole(folder / MARK, hashlib.sha256(recipe).hexdigest().encode())

    @property
    def empty(self) -> bool:
        """Whether neither a stage nor an epoch was kept."""
        return not any(self.folder.glob("*.pt"))

    def step(self, number: int) -> Step | None:
        """The step that a stage came to, if it was run before."""
        path = self.folder / f"{number}.json"
        try:
            return Step.model_validate_json(path.read_bytes()) if path.exists() else None
        except ValidationError as error:
            raise InputError(f"{path} is damaged; remove {self.folder} to begin anew") from error

    def weights(self, number: int) -> dict[str, Tensor]:
        """All parameters and buffers after a stage."""
        path = self.folder / f"{number}.pt"
        try:
            saved: dict[str, Tensor] = torch.load(path, weights_only=True)
        except Exception as error:  # a damaged file makes torch raise many kinds
            raise InputError(f"{path} is damaged or missing; remove {self.folder} to begin anew") from error
        return saved

    def epochs(self, number: int) -> Path:
        """Where training writes after each epoch."""
        return self.folder / f"{number}.epoch.pt"

    def keep(self, number: int, model: nn.Module, step: Step) -> None:
        if not team().first:
            return
        save(self.folder / f"{number}.pt", model.state_dict())
        write_whole(self.folder / f"{number}.json", step.model_dump_json().encode())
        self.epochs(number).unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes it, and the folder around it if nothing else is there."""
        if not team().first:
            return
        if self.folder.exists():
            (self.folder / MARK).unlink(missing_ok=True)  # what is left if we are killed now is nothing to resume
            shutil.rmtree(self.folder)
        if self.folder.parent.exists() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()
