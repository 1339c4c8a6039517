"""The second opinion: three counts of MACs beside each other, and only facts explain what differs."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import micronet_eval
from micronet_eval import crosscheck, packing, plugins
from micronet_eval.formats import FixedPointQuantizer
from micronet_eval.language import example_input
from micronet_eval.structure import set_quantizers, traced
from micronet_plugins.language import lstm_lm, transformer_lm


def check(module, *shape):
    return micronet_eval.score(module, torch.zeros(shape), cross_check=True).cross_check


class Attention(nn.Module):
    """Linear 64->192 and the fused product, 4 heads: 196,608 MACs in the layer, 2 x 16 x 16 x 64 in the products."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(1, 16, 3, 4, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


def test_where_all_agree_there_is_nothing_to_explain():
    # 8 x 8 x 9 weights at 16 x 16 positions, and 2048 x 10.
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10))
    found = check(model, 1, 8, 16, 16)
    assert (found.ours, found.dense, found.fvcore, found.flop_counter) == (147_456 + 20_480,) * 4
    assert (found.modules, found.differences, found.unexplained, found.failed) == (2, (), 0, {})
    assert found.fvcore_skips == {}  # fvcore knows that it ignores ReLU


def test_zero_weights_are_the_reason():
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)[:32] = 0
    found = check(nn.Sequential(layer), 1, 64)
    assert (found.ours, found.dense, found.fvcore, found.flop_counter) == (2_048, 4_096, 4_096, 4_096)
    (difference,) = found.differences
    assert (difference.module, difference.why, difference.unexplained) == ("0", ("zero weights: 2,048",), 0)


def test_an_operation_without_a_formula_is_the_reason():
    found = check(Attention(), 1, 16, 64)
    assert (found.ours, found.fvcore, found.flop_counter) == (229_376, 196_608, 229_376)
    (difference,) = found.differences
    assert difference.module == ""
    assert difference.why == ("fvcore has no formula for scaled_dot_product_attention: 32,768 in bmm",)
    assert found.unexplained == 0
    assert found.fvcore_skips == {"scaled_dot_product_attention": 1}


def test_the_fast_path_of_attention_hides_it_from_both():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    found = check(layer, 1, 16, 64)
    # Both linear layers of 64 x 128 at 16 tokens are seen.
    assert (found.ours, found.fvcore, found.flop_counter) == (557_056, 262_144, 262_144)
    (difference,) = found.differences
    assert difference.module == "self_attn"
    assert [why.partition(":")[0] for why in difference.why] == [
        "fvcore has no formula for native_multi_head_attention",
        "FlopCounterMode has no formula for native_multi_head_attention",
    ]
    assert found.unexplained == 0


def test_what_no_fact_explains_is_unexplained(monkeypatch):
    found = check(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 1, 4)
    assert found.unexplained == 0
    real = crosscheck._fvcore

    def wrong(model, example):
        opinion = real(model, example)
        return crosscheck._Opinion({**opinion.macs, "1": 7, "2": 5}, opinion.skips, opinion.other)

    monkeypatch.setattr(crosscheck, "_fvcore", wrong)
    found = check(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 1, 4)
    assert [(d.module, d.why, d.unexplained) for d in found.differences] == [
        ("1", ("unexplained: fvcore has 9 fewer",), 9),
        ("2", ("unexplained: fvcore has 5 more",), 5),
    ]
    assert found.unexplained == 14


def test_a_missing_formula_explains_only_what_it_can(monkeypatch):
    # fvcore passes over the products of attention; a wrong count of the layer beside them is still unexplained.
    real = crosscheck._fvcore

    def wrong(model, example):
        opinion = real(model, example)
        return crosscheck._Opinion({**opinion.macs, "": 1}, opinion.skips, opinion.other)

    monkeypatch.setattr(crosscheck, "_fvcore", wrong)
    (difference,) = check(Attention(), 1, 16, 64).differences
    assert difference.why == ("unexplained: fvcore has 32,767 fewer",)


def test_a_counter_that_fails_is_told(run, monkeypatch):
    def broken(model, example):
        raise RuntimeError("not this one\nand more")

    monkeypatch.setattr(crosscheck, "_fvcore", broken)
    found = check(nn.Linear(4, 4), 1, 4)
    assert (found.fvcore, found.flop_counter, found.ours) == (None, 16, 16)
    assert (found.failed, found.differences) == ({"fvcore": "RuntimeError: not this one"}, ())
    _, out, _ = run("count", "torchvision:resnet18", "--input", "1x3x64x64", "--cross-check")
    assert "fvcore could not run: RuntimeError: not this one" in out


def test_functional_layers_of_a_graph_run_in_its_own_forward():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return F.linear(x, self.weight)

    graph = traced(nn.Sequential(Block(), nn.Linear(4, 4)))
    set_quantizers(graph, {"linear": FixedPointQuantizer(8)})
    found = check(graph, 1, 4)
    assert (found.ours, found.fvcore, found.flop_counter, found.differences) == (32, 32, 32, ())


@pytest.mark.parametrize(
    ("made", "name", "options", "macs"),
    [
        # Embeddings of 2 and 1 numbers become 4; gates 32 x (4 + 8), and 8 x 4 behind; then 10 words and two clusters
        # by 4, from 4 to 2 and 10 words by 2, from 4 to 1 and 30 words by 1.
        (
            lstm_lm,
            "lstm-lm",
            {"vocab": 50, "hidden": 8, "projection": 4, "cutoffs": [10, 20], "factor": 2},
            8 + 4 + 384 + 32 + 48 + 28 + 34,
        ),
        # Keys, queries and values 24 x 8, 8 keys x 8 twice, 8 x 8, two linear layers of 8 x 8, 50 words x 8.
        (
            transformer_lm,
            "transformer-lm",
            {"vocab": 50, "width": 8, "layers": 1, "heads": 2, "hidden": 8, "context": 8},
            192 + 128 + 64 + 128 + 400,
        ),
    ],
    ids=["lstm", "transformer"],
)
def test_of_a_language_model_one_step_is_compared(run, tmp_path, made, name, options, macs):
    torch.manual_seed(0)
    model = made(**options).eval()
    packed = packing.pack(model, made(**options), example_input(plugins.lookup("task", "wikitext103"), model))
    packing.write(packed, tmp_path / "weights.safetensors")
    table = "\n".join(f"{option} = {value}" for option, value in options.items())
    manifest = f'name = "words"\ntask = "wikitext103"\nauthors = ["test"]\n[architecture]\nname = "{name}"\n{table}\n'
    (tmp_path / "submission.toml").write_text(manifest)
    status, out, _ = run(tmp_path, "--cross-check", "--format", "json")
    report = json.loads(out)
    found = report["cross_check"]
    assert (status, found["failed"], found["differences"]) == (0, {}, [])
    assert found["ours"] == found["fvcore"] == found["flop_counter"] == macs != report["math"]["macs"]
    table = " ".join(run(tmp_path, "--cross-check")[1].split())
    assert f"This is one forward pass; the report counts the mean, {report['math']['macs']:,.10g} MACs" in table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_stays_as_it_is(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).to(dtype).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = micronet_eval.score(model, torch.zeros(1, 4, dtype=dtype), cross_check=True).cross_check
    assert (found.fvcore, found.flop_counter) == (16, 16)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert not model[0]._forward_hooks


def test_the_command_shows_it_without_noise(run, submission, caplog):
    with caplog.at_level(logging.DEBUG):
        _, out, err = run(submission, "--cross-check")
    assert (err, [r for r in caplog.records if r.name.startswith("fvcore")]) == ("", [])
    assert "nothing is unexplained" in out
    report = json.loads(run(submission, "--cross-check", "--format", "json")[1])
    found = report["cross_check"]
    assert found["ours"] == report["math"]["macs"]
    assert found["fvcore"] == found["flop_counter"] == found["dense"] > found["ours"]
    assert found["unexplained"] == 0
    assert all(d["dense"] - d["ours"] == int(d["why"][0].split()[-1].replace(",", "")) for d in found["differences"])
    assert json.loads(run(submission, "--format", "json")[1])["cross_check"] is None
