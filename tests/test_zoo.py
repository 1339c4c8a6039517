"""Every classification model of torchvision is counted without an unknown operation."""

import pytest
import torch
from torchvision import models

from micronet_eval import score
from micronet_eval.errors import InputError
from micronet_eval.targets import torchvision_model
from micronet_eval.trace import trace

# RegNets compute their widths with tensors, so that they are built with real weights. This one (645 M parameters)
# takes 22 s to build, 56 s in all, and 6.6 GB; the fourteen others, up to 145 M, take less than 7 s each.
TOO_LARGE = {"regnet_y_128gf"}


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")  # GoogleNet and Inception
@pytest.mark.parametrize("name", sorted(set(models.list_models(models)) - TOO_LARGE))
def test_every_model_of_torchvision_counts(name):
    """All of torchvision's classification models but one, which is named in TOO_LARGE."""
    size = 299 if name == "inception_v3" else 224
    report = score(torchvision_model(name), torch.zeros(1, 3, size, size), task="imagenet")
    # The smallest (MobileNetV3 small, SqueezeNet, ShuffleNet x0.5) have 1.2 M values and 40 M MACs.
    assert report.storage.parameters > 1_000_000
    assert report.math.macs > 40_000_000
    assert report.math.mults >= report.math.macs
    assert sum(layer.mults for layer in report.layers) == report.math.mults
    assert set(report.coverage.free.values()).isdisjoint({""})


def test_only_known_models_are_left_out():
    assert set(models.list_models(models)) >= TOO_LARGE


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "convnext_base", "densenet121", "inception_v3", "swin_t", "vit_b_32"]
)
def test_macs_agree_with_torchvisions_own_table(name):
    """Its metadata has the multiply-accumulates in billions, to three digits."""
    size = 299 if name == "inception_v3" else 224
    report = score(torchvision_model(name), torch.zeros(1, 3, size, size))
    assert round(report.math.macs / 1e9, 3) == models.get_model_weights(name).DEFAULT.meta["_ops"]


def test_an_input_of_the_wrong_size_is_an_input_error():
    with pytest.raises(InputError, match="1x3x200x200"):
        trace(torchvision_model("vit_b_32"), torch.zeros(1, 3, 200, 200))
