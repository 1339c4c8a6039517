"""ShakeDrop (Yamada et al. 2018, arXiv 1802.02375): residual branches disturbed while a network is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ShakeDrop(nn.Module):
    """Multiplies a branch by b + a - b a forward and by b + c - b c backward; nothing in evaluation mode.

    b is 1 with probability `keep` and else 0, one for a batch; a, in -1 ... 1, and c, in 0 ... 1, are drawn for each
    example. The paper multiplies by the mean of the forward factor, which is `keep`, when it infers; here training
    divides by it, so that inference multiplies nothing *(ours)*.
    """

    def __init__(self, keep: float) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"a branch is kept with a probability above 0, up to 1, not {keep}")
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.keep == 1:
            return x
        if torch.rand(()) < self.keep:
            return x / self.keep
        shape = len(x), *[1] * (x.dim() - 1)
        forward, backward = torch.rand(shape) * 2 - 1, torch.rand(shape)
        return _Shake.apply(x, forward.to(x) / self.keep, backward.to(x) / self.keep)

    def extra_repr(self) -> str:
        return f"keep={self.keep:.3f}"


class _Shake(torch.autograd.Function):
    """One factor forward, another one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        ctx.save_for_backward(backward)
        return x * forward

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.saved_tensors[0], None, None


def keeps(blocks: int, last: float) -> list[float]:
    """The probability of each block, falling along the depth to that of the `last`: 1 - l / L (1 - p_L)."""
    return [1 - block / blocks * (1 - last) for block in range(1, blocks + 1)]
