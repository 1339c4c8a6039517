"""Rulesets: what the challenge's text charges for transcendental functions, beside what its counter does."""

import json

import pytest
import torch
from torch import nn
from torchvision.models import efficientnet_b0

import micronet_eval
from micronet_eval.errors import InputError
from micronet_eval.rulesets import RULESETS


def cost(module, ruleset):
    math = micronet_eval.score(module, torch.zeros(1, 10), ruleset=ruleset).math
    return math.mults // 10, math.adds // 10


@pytest.mark.parametrize(
    ("module", "counter", "text"),
    [
        (nn.Sigmoid(), (2, 1), (1, 0)),
        (nn.SiLU(), (3, 1), (2, 0)),
        (nn.Tanh(), (1, 0), (1, 0)),
        (nn.GELU(), (4, 1), (4, 1)),  # its erf counts 1 in both
        (nn.Hardsigmoid(), (2, 1), (2, 1)),  # nothing transcendental
        (nn.Hardswish(), (3, 1), (3, 1)),
        (nn.ReLU(), (1, 0), (1, 0)),
    ],
)
@pytest.mark.rule("score.ruleset")
def test_an_element_costs(module, counter, text):
    assert cost(module, "micronet-2019") == counter
    assert cost(module, "micronet-2019-text") == text


def test_efficientnet_b0_by_the_text():
    # From the dense counts by the counter, one multiplication and one addition less for each element that a swish or a
    # sigmoid writes; hooks count those elements.
    with torch.device("meta"):
        model = efficientnet_b0()
    example = torch.zeros(1, 3, 224, 224)
    elements = 0

    def add(module, inputs, output):
        nonlocal elements
        elements += output.numel()

    for module in model.modules():
        if isinstance(module, nn.SiLU | nn.Sigmoid):
            module.register_forward_hook(add)
    model.eval()(example.to("meta"))
    for module in model.modules():
        module._forward_hooks.clear()
    report = micronet_eval.score(model, example, task="imagenet", ruleset="micronet-2019-text")
    assert report.math.mults == 406_623_188 - elements
    assert report.math.adds == 394_550_748 - elements
    assert report.math.macs == 385_814_752


def test_every_report_names_its_ruleset(run, submission):
    for name in RULESETS:
        _, out, _ = run(submission, "--ruleset", name, "--format", "json")
        assert json.loads(out)["ruleset"] == name
        assert name in run(submission, "--ruleset", name)[1].splitlines()[0]
    assert micronet_eval.evaluate(submission).ruleset == "micronet-2019"
    assert run("count", "torchvision:resnet18", "--input", "1x3x64x64", "--ruleset", "micronet-2019-text")[0] == 0


def test_an_unknown_ruleset(run, submission):
    status, _, err = run(submission, "--ruleset", "micronet-2020")
    assert (status, err) == (
        2, "micronet-eval: unknown ruleset 'micronet-2020'; known: micronet-2019, micronet-2019-text\n"
    )  # fmt: skip
    assert run("explain", "nowhere", "a", "--ruleset", "micronet-2020")[2] == err
    with pytest.raises(InputError, match=r"^unknown ruleset 'x'"):
        micronet_eval.explain(submission, "1.0.conv1", ruleset="x")
    with pytest.raises(InputError, match="unknown ruleset"):
        micronet_eval.score(nn.ReLU(), torch.zeros(1), ruleset="")
