"""Training images changed at random, whole batches at a time: cropped, flipped, erased, by the rules of a policy.

Every random number comes from torch's generator. Images are [B, C, H, W], on any device, in any scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from micronet_eval.errors import InputError
from micronet_eval.submission import Table, read_toml

Change = Callable[[Tensor], Tensor]
Name = Literal[
    "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "autocontrast", "invert", "equalize", "solarize",
    "posterize", "contrast", "saturation", "brightness", "sharpness", "cutout",
]  # fmt: skip
OPERATIONS: tuple[Name, ...] = get_args(Name)

PARTS = 8
"""How many sub-policies a batch draws at most, for so many parts of it: each operation is called for all of a part."""

LEAST_AREA, MOST_AREA, ASPECT = 0.02, 0.4, 0.3
"""Of what is erased: shares of the image, and the least ratio of its sides (Zhong et al. 2017, arXiv 1708.04896)."""


class Augmentation(Table):
    """How training images are changed before a batch is trained on.

    `crop`: zeros are padded on each side, and a part of the size before is cut out. `flip`: half of the images are
    mirrored. `erase`: the share of the images in which a rectangle is replaced by noise (arXiv 1708.04896). `augment`:
    the file of a policy, as `micronet-eval augment` writes it.
    """

    crop: int = Field(0, ge=0)
    flip: bool = False
    erase: float = Field(0.0, ge=0, le=1)
    augment: str = ""

    @property
    def changes(self) -> bool:
        """Whether images are changed at all."""
        return bool(self.crop or self.flip or self.erase or self.augment)


def augmenter(how: Augmentation) -> Change:
    """What `how` does to a batch. Raises InputError where a policy's file is wrong, and for what are no images."""
    changes: list[Change] = []
    if how.augment:
        changes.append(applier(read_toml(Path(how.augment), Policy)))
    if how.crop:
        changes.append(lambda images: cropped(images, how.crop))
    if how.flip:
        changes.append(flipped)
    if how.erase:
        changes.append(lambda images: erased(images, how.erase))

    def augmented(images: Tensor) -> Tensor:
        if changes and images.ndim != 4:
            raise InputError(
                f"train: crop, flip, erase and augment change images, not inputs of {images.ndim - 1} axes"
            )
        for change in changes:
            images = change(images)
        return images

    return augmented


def cropped(images: Tensor, padding: int) -> Tensor:
    """A part of each image's own size, out of the image with so many zeros around it."""
    count, _, height, width = images.shape
    parts = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, count)).to(images.device)
    return parts[torch.arange(count, device=images.device), :, top, left]


def flipped(images: Tensor) -> Tensor:
    """Half of the images mirrored, left to right."""
    return torch.where(_some(images, 0.5), images.flip(-1), images)


def erased(images: Tensor, share: float) -> Tensor:
    """A rectangle of some images replaced by normal noise with the batch's mean and deviation *(ours)*."""
    count = len(images)
    area = torch.empty(count).uniform_(LEAST_AREA, MOST_AREA)
    ratio = torch.empty(count).uniform_(math.log(ASPECT), -math.log(ASPECT)).exp()
    inside = rectangles(images, (area * ratio).sqrt(), (area / ratio).sqrt())
    noise = torch.randn(images.shape, device=images.device) * images.std() + images.mean()
    return torch.where(inside & _some(images, share), noise, images)


def rectangles(images: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    """Bool [B, 1, H, W]: what lies in a rectangle of each image, at random; sides [B] are shares of the image's."""

    def span(size: int, shares: Tensor) -> Tensor:
        length = (shares.clamp(max=1) * size).round()
        start = (torch.rand(len(shares)) * (size - length + 1)).floor()
        at = torch.arange(size)
        return (at >= start[:, None]) & (at < (start + length)[:, None])

    rows, columns = span(images.shape[-2], heights), span(images.shape[-1], widths)
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)


def _some(images: Tensor, share: float) -> Tensor:
    return (torch.rand(len(images), 1, 1, 1) < share).to(images.device)


# --- policies ---------------------------------------------------------------------------------------------------------


class Operation(Table):
    """One of torchvision's operations, how often it is done, and how much of it."""

    name: Name
    probability: float = Field(ge=0, le=1)
    magnitude: float = Field(ge=0, le=1)


class Policy(Table):
    """Sub-policies of operations that follow each other; each image gets one of them.

    `low` and `high` are the least and the largest value of each channel in the training data: what operations take for
    black and white.
    """

    low: list[float] = Field(min_length=1)
    high: list[float] = Field(min_length=1)
    sub_policies: list[list[Operation]] = Field(min_length=1)

    @model_validator(mode="after")
    def _ranges(self) -> Policy:
        if len(self.low) != len(self.high) or any(a >= b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError("low and high: one of each for every channel, low below high")
        return self


def applier(policy: Policy, parts: int = PARTS) -> Change:
    """What a policy does to a batch: split at random among at most so many sub-policies, drawn anew for each batch."""

    def apply(images: Tensor) -> Tensor:
        if images.shape[1] != len(policy.low):
            raise InputError(f"train: the policy is for {len(policy.low)} channels, the images have {images.shape[1]}")
        low, high = (torch.tensor(v, device=images.device)[:, None, None] for v in (policy.low, policy.high))
        result = (images - low) / (high - low)
        drawn = torch.randperm(len(policy.sub_policies))[: min(parts, len(images))].tolist()
        for part, which in zip(torch.randperm(len(images)).chunk(len(drawn)), drawn, strict=False):
            for operation in policy.sub_policies[which]:
                chosen = part[torch.rand(len(part)) < operation.probability].to(images.device)
                if len(chosen):
                    result[chosen] = operate(operation.name, operation.magnitude, result[chosen])
        return result.clamp(0, 1) * (high - low) + low

    return apply


def operate(name: Name, magnitude: float, images: Tensor) -> Tensor:
    """An operation on images in 0 ... 1. Its range is that of Lim et al. 2019 (arXiv 1905.00397), weak to strong.

    Which way an image is turned or moved is drawn; it is filled up with black.
    """
    functional = _functional()
    sign = 1 if torch.rand(()) < 0.5 else -1
    if name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
        shear = sign * math.degrees(math.atan(0.3 * magnitude))
        moves = {
            "shear_x": ((0, 0), (shear, 0.0), 0.0),
            "shear_y": ((0, 0), (0.0, shear), 0.0),
            "translate_x": ((sign * round(0.45 * magnitude * images.shape[-1]), 0), (0.0, 0.0), 0.0),
            "translate_y": ((0, sign * round(0.45 * magnitude * images.shape[-2])), (0.0, 0.0), 0.0),
            "rotate": ((0, 0), (0.0, 0.0), sign * 30 * magnitude),
        }
        translate, shears, angle = moves[name]
        bilinear = functional.InterpolationMode.BILINEAR
        moved: Tensor = functional.affine(images, angle, list(translate), 1.0, list(shears), interpolation=bilinear)
        return moved
    if name == "cutout":
        side = torch.full((len(images),), 0.2 * magnitude)
        return images.masked_fill(rectangles(images, side, side), 0.5)
    strength = 1 + sign * 0.9 * magnitude
    changed: dict[str, Callable[[], Tensor]] = {
        "autocontrast": lambda: functional.autocontrast(images),
        "invert": lambda: functional.invert(images),
        "equalize": lambda: functional.equalize(images),
        "solarize": lambda: functional.solarize(images, 1 - magnitude),
        "posterize": lambda: functional.posterize(images, round(8 - 4 * magnitude)),
        "contrast": lambda: functional.adjust_contrast(images, strength),
        "saturation": lambda: functional.adjust_saturation(images, strength),
        "brightness": lambda: functional.adjust_brightness(images, strength),
        "sharpness": lambda: functional.adjust_sharpness(images, strength),
    }
    return changed[name]()


def _functional() -> Any:
    from torchvision.transforms.v2 import functional  # only here, because it takes long to import

    return functional
