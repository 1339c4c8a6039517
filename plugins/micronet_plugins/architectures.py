"""Architectures: the one that WaveComp compressed, and the baselines of the tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from micronet_plugins.shake_drop import ShakeDrop, keeps


class Bottleneck(nn.Module):
    """PyramidNet's bottleneck (Han et al. 2017, arXiv 1610.02915): BN 1x1 BN ReLU 3x3 BN ReLU 1x1 BN, plus shortcut.

    The shortcut is averaged where the block strides, and padded with zero channels where the block widens.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, keep: float = 1.0) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()  # 7 becomes 4, as in conv2
        self.shake = ShakeDrop(keep)
        self.widening = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.shake(self.bn4(self.conv3(self.relu(self.bn3(out)))))
        return out + F.pad(self.shortcut(x), (0, 0, 0, 0, 0, self.widening))


def pyramidnet(
    depth: int = 272,
    alpha: int = 200,
    classes: int = 100,
    channels: int = 3,
    pool: int = 8,
    shake_drop: float = 1.0,
    stride: int = 1,
) -> nn.Module:
    """PyramidNet for small images: three stages of bottleneck blocks whose width grows by alpha / blocks a block.

    Depth 272 and alpha 200 are WaveComp's for 3x32x32: 90 blocks, 26.2 M parameters. `channels` are those of the image,
    `pool` a quarter of its size, or of what the first convolution leaves with another `stride`. `shake_drop` is the
    probability that the last block is left as it is in training; 0.5 is the paper's, 1 none. It costs nothing in
    inference.
    """
    if depth < 11 or (depth - 2) % 9:
        raise ValueError(f"depth {depth}: a bottleneck PyramidNet has 9 n + 2 layers")
    blocks_a_stage = (depth - 2) // 9
    blocks = 3 * blocks_a_stage
    width_in, keep = 16, keeps(blocks, shake_drop)
    stages: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(channels, width_in, 3, stride, 1, bias=False), nn.BatchNorm2d(width_in))
    ]
    for stage in range(3):
        layers = []
        for i in range(blocks_a_stage):
            block = stage * blocks_a_stage + i
            width = round(16 + alpha * (block + 1) / blocks)
            layers.append(Bottleneck(width_in, width, 2 if stage and i == 0 else 1, keep[block]))
            width_in = width * Bottleneck.expansion
        stages.append(nn.Sequential(*layers))
    head = nn.Sequential(
        nn.BatchNorm2d(width_in), nn.ReLU(), nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(width_in, classes)
    )
    return _initialised(nn.Sequential(*stages, head))


class WideBlock(nn.Module):
    """Pre-activation basic block of a wide residual network (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.relu(self.bn2(self.conv1(out)))) + x


def wide_resnet(depth: int = 28, width: int = 10, classes: int = 100, channels: int = 3) -> nn.Module:
    """WideResNet-depth-width: three stages of (depth - 4) / 6 blocks, 16, 32 and 64 times `width` channels.

    28-10 on 3x32x32 is the baseline of CIFAR-100.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth {depth}: a wide residual network has 6 n + 4 layers")
    stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
    stages, before = [], 16
    for stage in range(3):
        after = 16 * 2**stage * width
        blocks = [WideBlock(before, after, stride=2 if stage else 1)]
        blocks += [WideBlock(after, after, 1) for _ in range((depth - 4) // 6 - 1)]
        stages.append(nn.Sequential(*blocks))
        before = after
    pool = nn.AdaptiveAvgPool2d(1)
    head = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU(), pool, nn.Flatten(), nn.Linear(before, classes))
    return _initialised(nn.Sequential(stem, *stages, head))


class BasicBlock(nn.Module):
    """Basic block of a residual network (He et al. 2016, arXiv 1512.03385): 3x3 BN ReLU 3x3 BN, plus shortcut, ReLU.

    Where the block strides or widens the shortcut is averaged, then widened by a 1x1 (He et al. 2019, arXiv
    1812.01187).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        pool = [nn.AvgPool2d(2, ceil_mode=True)] if stride == 2 else []  # 7 becomes 4, as in the convolution
        widen = [nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)]
        self.shortcut = nn.Sequential(*pool, *widen) if pool or in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.shortcut(x))


def resnet(
    widths: Sequence[int] = (16, 32, 64),
    blocks: Sequence[int] = (1, 2, 1),
    stem: int = 16,
    kernel: int = 5,
    stride: int = 2,
    classes: int = 10,
    channels: int = 1,
) -> nn.Module:
    """A residual network for small images: a convolution with `stem` filters, then stages of basic blocks.

    `kernel` and `stride` are the stem's. Each stage after the first halves the image; its blocks have so many channels.
    The default has 96,570 parameters, and 3.5 M MACs on 1x28x28.
    """
    if len(widths) != len(blocks):
        raise ValueError(f"widths and blocks: one of each for a stage, not {len(widths)} and {len(blocks)}")
    layers = [nn.Conv2d(channels, stem, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
    before = stem
    for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for j in range(count):
            layers.append(BasicBlock(before, width, stride=2 if i and not j else 1))
            before = width
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
    return _initialised(nn.Sequential(*layers, *head))


def mobilenet_v2(width: float = 1.4, classes: int = 1000) -> nn.Module:
    """torchvision's MobileNetV2; width 1.4 is the baseline of ImageNet."""
    from torchvision.models import mobilenet_v2 as build

    return build(width_mult=width, num_classes=classes)


def torchvision_model(model: str, classes: int = 1000) -> nn.Module:
    """Any classification model of torchvision, by its name there, without weights."""
    from torchvision import models
    from torchvision.models import get_model

    if model not in models.list_models(models):  # others would download the weights of their backbone
        raise ValueError(f"torchvision has no classification model {model!r}")
    return get_model(model, weights=None, num_classes=classes)


def _initialised(model: nn.Module) -> nn.Module:
    """Weights of convolutions as He et al. 2015 (arXiv 1502.01852) draw them, by fan-out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
