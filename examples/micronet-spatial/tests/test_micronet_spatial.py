"""What micronet-eval expects of every pruner, and what is special about this one."""

import json
import subprocess

import pytest
import torch
from micronet_spatial.pruner import Spatial
from torch import nn

from micronet_eval.plugins import lookup
from micronet_eval.testing import checks

CHECKS = dict(checks(Spatial))
CHECKS = {name: check for name, check in CHECKS.items() if "linear" not in name}  # it is for convolutions


@pytest.mark.parametrize("name", CHECKS)
def test_it_is_what_a_pruner_must_be(name):
    CHECKS[name]()


def test_it_is_registered():
    assert lookup("pruner", "spatial") is Spatial


def test_a_separable_kernel_is_split_without_loss():
    layer = nn.Conv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([1.0, 0, -1])).view(1, 1, 3, 3))
    x = torch.rand(2, 1, 8, 8)
    assert torch.allclose(Spatial(share=0.9).split(layer)(x), layer(x), atol=1e-6)


def test_the_command_lists_it():
    listed = subprocess.run(["micronet-eval", "strategies", "--format", "json"], capture_output=True, check=True)
    assert {row["name"]: row["package"] for row in json.loads(listed.stdout)}["spatial"] == "micronet-spatial 0.1.0"
