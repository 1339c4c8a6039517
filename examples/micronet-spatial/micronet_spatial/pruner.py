import copy

import torch
from pydantic import Field
from torch import nn

from micronet_eval.strategy import Context, Pruner
from micronet_eval.structure import layer_type, leaves, replace


class Spatial(Pruner):
    """Splits each k x k convolution into k x 1 and 1 x k (Jaderberg et al. 2014)."""

    share: float = Field(0.5, gt=0, lt=1, description="weights of the pair, as a share of the layer's")

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copy.deepcopy(model)
        for path, layer in list(leaves(model)):
            if layer_type(layer) is nn.Conv2d and layer.groups == 1 and min(layer.kernel_size) > 1:
                replace(model, path, self.split(layer))
        return model

    def split(self, layer: nn.Conv2d) -> nn.Sequential:
        outputs, inputs, rows, columns = layer.weight.shape
        rank = max(1, int(self.share * layer.weight.numel() / (inputs * rows + outputs * columns)))
        matrix = layer.weight.detach().permute(1, 2, 0, 3).reshape(inputs * rows, outputs * columns)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        u, v = u[:, :rank] * s[:rank].sqrt(), v[:rank].T * s[:rank].sqrt()
        (stride, padding, dilation), bias = (layer.stride, layer.padding, layer.dilation), layer.bias
        first = nn.Conv2d(inputs, rank, (rows, 1), (stride[0], 1), (padding[0], 0), (dilation[0], 1), bias=False)
        second = nn.Conv2d(rank, outputs, (1, columns), (1, stride[1]), (0, padding[1]), (1, dilation[1]))
        first.weight = nn.Parameter(u.T.reshape(rank, inputs, rows, 1).contiguous())
        second.weight = nn.Parameter(v.reshape(outputs, columns, 1, rank).permute(0, 3, 2, 1).contiguous())
        second.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return nn.Sequential(first, second)
