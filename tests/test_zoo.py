"""Every classification model of torchvision is counted without an unknown operation."""

import pytest
import torch
from torchvision import models

from micronet_eval import score
from micronet_eval.cli import _torchvision
from micronet_eval.errors import InputError
from micronet_eval.trace import trace

# RegNets compute their widths with tensors, so that they are built with real weights. This one (645 M parameters)
# takes 22 s to build, 56 s in all, and 6.6 GB; the fourteen others, up to 145 M, take less than 7 s each.
TOO_LARGE = {"regnet_y_128gf"}


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")  # GoogleNet and Inception
@pytest.mark.parametrize("name", sorted(set(models.list_models(models)) - TOO_LARGE))
def test_every_model_of_torchvision_counts(name):
    """All of torchvision's classification models but one, which is named in TOO_LARGE."""
    size = 299 if name == "inception_v3" else 224
    report = score(_torchvision(name), torch.zeros(1, 3, size, size), task="imagenet")
    # The smallest (MobileNetV3 small, SqueezeNet, ShuffleNet x0.5) have 1.2 M values and 40 M MACs.
    assert report.storage.parameters > 1_000_000
    assert report.math.macs > 40_000_000
    assert report.math.mults >= report.math.macs
    assert sum(layer.mults for layer in report.layers) == report.math.mults
    assert set(report.coverage.free.values()).isdisjoint({""})


def test_only_known_models_are_left_out():
    assert set(models.list_models(models)) >= TOO_LARGE


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        # torchvision's own table of weights gives GFLOPS, which are multiply-accumulates: 1.81, 0.30, 15.36, 5.71, 4.49
        ("resnet18", 1.81e9),
        ("mobilenet_v2", 0.30e9),
        ("convnext_base", 15.36e9),
        ("inception_v3", 5.71e9),
        ("swin_t", 4.49e9),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_macs_agree_with_torchvisions_table(name, macs):
    size = 299 if name == "inception_v3" else 224
    report = score(_torchvision(name), torch.zeros(1, 3, size, size))
    assert report.math.macs == pytest.approx(macs, abs=0.0051e9)


def test_an_input_of_the_wrong_size_is_an_input_error():
    with pytest.raises(InputError, match="1x3x200x200"):
        trace(_torchvision("vit_b_32"), torch.zeros(1, 3, 200, 200))
