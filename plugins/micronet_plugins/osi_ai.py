"""The network of OSI AI, third place on CIFAR-100 in the MicroNet Challenge 2019: a small EfficientNet with an exit.

Built from the layer table that the team published. Inverted bottlenecks with squeeze-and-excitation (Tan and Le 2019,
arXiv 1905.11946), batch norm behind every convolution but those of the squeeze.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from micronet_eval.conditional import Conditional

# in channels, out channels, stride, expansion
BLOCKS = (
    (24, 16, 1, 1),
    (16, 24, 1, 6),
    (24, 40, 2, 6),
    (40, 40, 1, 6),
    (40, 48, 1, 6),
    (48, 64, 1, 6),
    (64, 64, 1, 6),
    (64, 80, 2, 6),
    (80, 80, 1, 6),
    (80, 96, 1, 6),
)
STEM, HEAD, CLASSES = 24, 136, 100
SIZE = 63  # pixels a side, to which the images are up-sampled
SQUEEZE = 0.2  # channels of the squeeze, as a share of a block's input
EXIT_BEHIND = 4  # the block after which the exit branches off
SPLITS = 4  # ghost batch norm keeps statistics of so many parts of a batch


class ConvNorm(nn.Module):
    """Convolution, batch norm and, unless it projects, swish. Stride 2 pads at the bottom and at the right only."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, swish: bool = True
    ) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.Identity()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.swish = nn.SiLU() if swish else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.swish(self.norm(self.conv(self.pad(x))))


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation; a residual where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide, squeezed = in_channels * expansion, int(in_channels * SQUEEZE)
        self.expand = ConvNorm(in_channels, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, 3, stride, groups=wide)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(wide, squeezed, 1)
        self.swish = nn.SiLU()
        self.excite = nn.Conv2d(squeezed, wide, 1)
        self.gate = nn.Sigmoid()
        self.project = ConvNorm(wide, out_channels, 1, swish=False)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(self.expand(x))
        out = out * self.gate(self.excite(self.swish(self.squeeze(self.pool(out)))))
        out = self.project(out)
        return out + x if self.residual else out


class OsiAi(nn.Module):
    """The main network. Reads the team's state dict, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, 3, stride=2)
        self.blocks = nn.ModuleList(MBConv(*block) for block in BLOCKS)
        self.head = ConvNorm(BLOCKS[-1][1], HEAD, 1)
        self.classifier = _classifier()
        self.register_load_state_dict_pre_hook(_translate)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.start(x))

    def start(self, x: Tensor) -> Tensor:
        """Up to the block behind which the exit branches off."""
        x = self.stem(F.interpolate(x, size=(SIZE, SIZE)))
        for block in self.blocks[: EXIT_BEHIND + 1]:
            x = block(x)
        return x

    def finish(self, x: Tensor) -> Tensor:
        """From there to the logits."""
        for block in self.blocks[EXIT_BEHIND + 1 :]:
            x = block(x)
        return self.classifier(self.head(x))


class EarlyExit(Conditional, OsiAi):
    """The main network with its exit, which an example takes whose softmax there is at least `confidence`."""

    paths = ("exit", "full")

    def __init__(self, confidence: float) -> None:
        super().__init__()
        self.confidence = confidence
        width = BLOCKS[EXIT_BEHIND][1]
        self.exit = nn.Sequential(ConvNorm(width, width, 3, groups=width), ConvNorm(width, HEAD, 1), _classifier())

    def run(self, x: Tensor) -> Tensor:
        x = self.start(x)
        answer = self.exit(x)
        if self.takes("exit", answer.softmax(1).amax(1) >= self.confidence):
            return answer
        return self.finish(x)


def osi_ai(early_exit: bool = True, confidence: float = 0.85) -> nn.Module:
    """OSI AI's network for CIFAR-100, with its early exit or without."""
    return EarlyExit(confidence) if early_exit else OsiAi()


def _classifier() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(HEAD, CLASSES))


# --- the team's state dict --------------------------------------------------------------------------------------------

_LAYERS = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
    "_fc": "classifier.2",
    "_exit._depthwise_conv": "exit.0.conv",
    "_exit._bn0": "exit.0.norm",
    "_exit._expand_conv": "exit.1.conv",
    "_exit._bn1": "exit.1.norm",
    "_exit._fc": "exit.2.2",
}
_IN_A_BLOCK = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_se_reduce": "squeeze",
    "_se_expand": "excite",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


def _translate(model: OsiAi, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Gives the tensors of the team's file the names and shapes that they have here; other state dicts stay.

    Of the statistics of ghost batch norm, those of each part of a batch one after the other, evaluation takes the mean.
    A mask is multiplied into its weight. The exit's classifier is a 1x1 convolution there.
    """
    if f"{prefix}_conv_stem.weight" not in state:
        return
    theirs = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
    for key, tensor in theirs.items():
        layer, _, name = key.rpartition(".")
        if name == "mask" or (layer.startswith("_exit") and not isinstance(model, EarlyExit)):
            continue
        if name in ("running_mean", "running_var"):
            tensor = tensor.view(SPLITS, -1).mean(0)
        if (mask := theirs.get(f"{layer}.mask")) is not None and name == "weight":
            tensor = tensor * mask
        if layer == "_exit._fc" and name == "weight":
            tensor = tensor.flatten(1)
        state[f"{prefix}{_name(layer)}.{name}"] = tensor


def _name(layer: str) -> str:
    if not layer.startswith("_blocks."):
        return _LAYERS.get(layer, layer)
    block, _, inside = layer.removeprefix("_blocks.").partition(".")
    return f"blocks.{block}.{_IN_A_BLOCK.get(inside, inside)}"
