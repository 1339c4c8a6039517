"""`explain` ends in the report's figures; the parts of `diff` sum to the whole."""

import itertools
import json
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import micronet_eval
from micronet_eval.diffing import diff, report_of
from micronet_eval.errors import InputError
from micronet_eval.explaining import explain
from micronet_eval.formats import FixedPointQuantizer
from micronet_eval.opening import open_submission


@pytest.fixture(scope="module")
def digits():
    return open_submission("submissions/digits")


def figures(explanation):
    return {name: text for name, text in explanation.lines if name}


# --- explain ----------------------------------------------------------------------------------------------------------


def test_every_operation_ends_in_the_figures_of_the_report(digits):
    layers = [(x.module, x.op, x.mults, x.adds, x.ops32, x.storage_bits) for x in digits.account().layers]
    modules = dict.fromkeys(layer[0].partition(".")[0] for layer in layers)
    explained = [e for module in modules for e in explain(digits, module, "micronet-2019")]
    priced = [e for e in explained if not e.rule.startswith("free")]
    assert sorted((e.module, e.op, e.mults, e.adds, e.ops32, e.storage_bits) for e in priced) == sorted(layers)
    for e in priced:
        lines = figures(e)
        for name, figure in (("mults", e.mults), ("adds", e.adds)):
            assert lines.get(name, "= 0").endswith(f"= {figure:,}")
        assert lines["ops32"].endswith(f"= {e.ops32:,.10g}")


def test_the_printed_formulas_compute_what_they_say(digits):
    for e in explain(digits, "1", "micronet-2019"):
        formula, _, result = figures(e)["ops32"].replace(",", "").partition(" = ")
        assert eval(formula.replace(" x ", " * ")) == float(result)


def test_a_convolution_by_hand(digits):
    # A 3x3 layer at 8x8 positions; its zeros are counted here, not by the program.
    weight = digits.model.get_submodule("1.0.conv1.1").weight
    nonzeros, outputs = int((weight != 0).sum()), int((weight != 0).flatten(1).any(1).sum())
    (e,) = explain(digits, "1.0.conv1.1", "micronet-2019")
    shape = "x".join(map(str, weight.shape))
    assert figures(e) == {
        "mults": f"{nonzeros} non-zero of {weight.numel():,} weights ({shape}) x 64 positions = {nonzeros * 64:,}",
        "adds": f"({nonzeros} - {outputs} outputs with weights) x 64 positions = {(nonzeros - outputs) * 64:,}",
        "bits": "6 by 5: a multiplication counts 6/32, an accumulating addition counts 32/32",
        "ops32": f"{nonzeros * 64:,} x 6/32 + {(nonzeros - outputs) * 64:,} = "
        f"{nonzeros * 64 * 6 / 32 + (nonzeros - outputs) * 64:,.10g}",
        "stored": f"1.0.conv1.1.weight: {nonzeros} non-zero of {weight.numel():,} values x 5 + {weight.numel():,} mask "
        f"+ 8 fixed-point overhead = {nonzeros * 5 + weight.numel() + 8:,} bits",
    }


def test_a_free_operation_says_why(digits):
    (e,) = explain(digits, "4.3", "micronet-2019")
    assert (e.rule, e.mults, e.adds, e.ops32, e.lines) == ("free: a view or a copy of the same values", 0, 0, 0, ())


def test_the_command(run, submission):
    status, out, _ = run("explain", submission, "4")
    assert status == 0
    assert "non-zero of" in out
    assert "together" in out
    listed = json.loads(run("explain", submission, "4", "--format", "json")[1])
    report = json.loads(run(submission, "--format", "json")[1])
    layers = [x for x in report["layers"] if x["module"].startswith("4.")]
    assert [x["ops32"] for x in listed if x["lines"] and x["ops32"]] == [x["ops32"] for x in layers]


def test_a_module_that_is_not_there(run, submission):
    status, _, err = run("explain", submission, "1.0.conv9")
    assert status == 2
    assert re.fullmatch(r"micronet-eval: .*: unknown module '1.0.conv9'; nearest: .*1.0.conv1.*\n", err)


# --- diff -------------------------------------------------------------------------------------------------------------

PARTS = ("architecture", "sparsity", "bits")


def network(widths, sparsity, bits, seed=0):
    """Linear layers of these widths, a share of the weights zero, quantized to `bits` (0: not at all)."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for before, after in itertools.pairwise(widths):
        linear = nn.Linear(before, after)
        with torch.no_grad():
            linear.weight.copy_(torch.where(torch.rand(after, before, generator=generator) < sparsity, 0.0, 1.0))
            linear.bias.fill_(1.0)
        if bits:
            parametrize.register_parametrization(linear, "weight", FixedPointQuantizer(bits))
            layers.append(FixedPointQuantizer(bits))
        layers += [linear, nn.ReLU()]
    return micronet_eval.score(nn.Sequential(*layers), torch.zeros(1, widths[0]), task="digits")


def total(change):
    return sum((getattr(change, part) for part in PARTS), Fraction(0))


networks = st.builds(
    network,
    st.lists(st.integers(1, 12), min_size=2, max_size=4),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.sampled_from([0, 4, 16]),
    st.integers(0, 3),
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks, networks)
def test_the_parts_sum_to_the_whole(a, b):
    found = diff(a, b)
    # The figures of the reports are exact in a float64, so the fractions have to be equal, not close.
    of_storage, of_math = 1 / (32 * Fraction(690_922)), 1 / Fraction(12_630_528)
    storage = (Fraction(b.storage.bits) - a.storage.bits) * of_storage
    math = (Fraction(b.math.ops32) - Fraction(a.math.ops32)) * of_math
    assert (total(found.storage), total(found.math)) == (storage, math)
    assert total(found.score) == storage + math == sum((total(c) for c in found.modules), Fraction(0))
    for part in PARTS:
        assert getattr(found.score, part) == sum((getattr(c, part) for c in found.modules), Fraction(0))
        assert getattr(found.score, part) == getattr(found.storage, part) + getattr(found.math, part)
    assert float(total(found.score)) == pytest.approx(b.score.total - a.score.total, abs=1e-12)
    back = diff(b, a)
    assert [getattr(back.score, p) for p in PARTS] == [-getattr(found.score, p) for p in PARTS]
    assert all(getattr(c, part) == 0 for c in diff(a, a).modules for part in PARTS)


def test_each_cause_has_its_part():
    dense = network([10, 10], 0.0, 0)
    sparse, narrow, small = network([10, 10], 0.5, 0), network([10, 10], 0.0, 8), network([10, 5], 0.0, 0)
    assert [getattr(diff(dense, small).score, p) != 0 for p in PARTS] == [True, False, True]  # the freebie halves both
    only_sparse = diff(dense, sparse).score
    assert only_sparse.architecture == 0
    assert only_sparse.sparsity < 0
    quantized = diff(dense, narrow).score
    assert (quantized.architecture, quantized.sparsity) == (0, 0)
    assert quantized.bits != 0


def test_the_steps_by_hand():
    # 10 x 10 weights and 10 biases; dense at 32 bits 110 values, 100 + 100 + 10 (ReLU) operations. One row of zeros,
    # where nothing runs: 90 + 90 + 10.
    linear = nn.Linear(10, 10)
    with torch.no_grad():
        linear.weight.fill_(2.0)[0] = 0
        linear.bias.fill_(1.0)
    parametrize.register_parametrization(linear, "weight", FixedPointQuantizer(4))
    model = nn.Sequential(FixedPointQuantizer(8), linear, nn.ReLU())
    report = micronet_eval.score(model, torch.zeros(1, 10), task="digits")
    quantizer, layer, relu = report.modules
    assert (quantizer.module, quantizer.dense_bits, quantizer.sparse_bits, quantizer.bits) == ("0", 0, 0, 8)
    assert (layer.dense_ops, layer.sparse_ops, layer.ops32) == (200, 180, 90 * 8 / 32 + 90)
    # 90 values and a mask of 10 rows are smaller than 100 values, of 32 bits and of 4; the exponent takes 8.
    assert (layer.dense_bits, layer.sparse_bits, layer.bits) == (110 * 32, 90 * 32 + 10 + 320, 90 * 4 + 10 + 8 + 320)
    assert (relu.dense_ops, relu.sparse_ops, relu.ops32) == (10, 10, 10)


def test_a_layer_that_became_several_is_compared_as_one(tmp_path):
    whole = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    parts = nn.Sequential(nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8)), nn.ReLU())
    for module in (*whole.modules(), *parts.modules()):
        for parameter in module.parameters(recurse=False):
            nn.init.ones_(parameter)
    a, b = (micronet_eval.score(model, torch.zeros(1, 8), task="digits") for model in (whole, parts))
    (layer,) = [c for c in diff(a, b).modules if c.architecture]
    assert layer.module == "0"
    # 64 + 8 values become 16 + 16 + 8; 64 + 64 operations become 16 + 14 + 16 + 16.
    assert layer.architecture == Fraction(40 - 72, 690_922) + Fraction(62 - 128, 12_630_528)


def test_the_command_compares_submissions_and_reports(run, submission, tmp_path, monkeypatch):
    digits = json.loads(run("submissions/digits", "--format", "json")[1])
    (tmp_path / "digits.json").write_text(json.dumps(digits))
    status, out, err = run("diff", tmp_path / "digits.json", submission, "--format", "json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found == json.loads(run("diff", "submissions/digits", submission, "--format", "json")[1])
    assert found["change"]["score"]["total"] == pytest.approx(found["after"]["score"] - found["before"]["score"])
    assert found["before"]["exact_accumulators"] == digits["what_if"]["exact_accumulators"]["score"]
    _, table, _ = run("diff", "submissions/digits", submission)
    assert "architecture" in table
    monkeypatch.setenv("COLUMNS", "40")
    _, table, _ = run("diff", "submissions/digits", submission)
    assert "…" not in table.partition("\n")[2] and f"{found['after']['score']:.5f}" in table.split()
    assert max(map(len, table.splitlines())) <= 40
    _, same, _ = run("diff", submission, submission, "--format", "json")
    assert all(m[part] == 0 for m in json.loads(same)["modules"] for part in (*PARTS, "total"))


def test_what_cannot_be_compared(run, submission, tmp_path):
    text = micronet_eval.evaluate(submission, ruleset="micronet-2019-text").to_json()
    (tmp_path / "text.json").write_text(text)
    status, _, err = run("diff", submission, tmp_path / "text.json")
    assert (status, "differ in ruleset: 'micronet-2019' and 'micronet-2019-text'" in err) == (2, True)
    (tmp_path / "old.json").write_text(json.dumps({**json.loads(text), "modules": [{"module": ""}]}))
    status, _, err = run("diff", submission, tmp_path / "old.json")
    assert (status, "old.json is no report of this version: field 'modules.0.dense_ops'" in err) == (2, True)
    for number in (float("inf"), float("nan")):
        report = json.loads(text)
        report["modules"][0]["ops32"] = number
        (tmp_path / "wrong.json").write_text(json.dumps(report))
        status, _, err = run("diff", submission, tmp_path / "wrong.json")
        assert (status, len(err.splitlines())) == (2, 1)
        assert "wrong.json is no report of this version: field 'modules.0.ops32': Input should be a finite" in err
    (tmp_path / "none.json").write_text("nonsense")
    assert run("diff", submission, tmp_path / "none.json")[0] == 2
    status, _, err = run("diff", submission, tmp_path / "missing.json")
    assert (status, "missing.json cannot be read" in err) == (2, True)
    without_task = micronet_eval.score(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(InputError, match="has no score"):
        diff(without_task, without_task)
    (tmp_path / "none.json").write_text(json.dumps({**json.loads(report_of(submission).to_json()), "score": None}))
    status, _, err = run("diff", submission, tmp_path / "none.json")
    assert (status, "small has no score; compare reports" in err) == (2, True)
    assert report_of(submission).quality.measured is None


def test_a_report_that_says_nothing_of_bits_in_code_has_none(submission, tmp_path):
    report = json.loads(report_of(submission).to_json())
    del report["storage"]["code_bits"]  # as before there was such a field
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert report_of(tmp_path / "report.json").storage.code_bits == 0
