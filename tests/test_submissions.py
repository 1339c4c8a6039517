"""The submissions in the repository: measured against the published table, and rebuilt from their recipes."""

from pathlib import Path

import pytest

from micronet_eval import packing
from micronet_eval.evaluation import evaluate
from micronet_eval.recipe import compress
from micronet_eval.submission import read_manifest

FOLDER = Path(__file__).parent.parent / "submissions"

# storage, math, score, weight bits; before quantization: parameters, non-zeros, operations (docs/wavecomp.md)
WAVECOMP = {
    "1": (344_500, 391.2e6, 0.0467, 9, 1.89e6, 1.011e6, 580e6),
    "2": (355_800, 384.8e6, 0.0464, 10, 1.826e6, 0.951e6, 560e6),
    "3": (324_670, 384.8e6, 0.04558, 9, 1.826e6, 0.951e6, 560e6),
}


@pytest.mark.parametrize("name", WAVECOMP)
def test_a_wavecomp_submission_is_as_small_as_the_entry(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    storage, math, score, bits, parameters, nonzeros, operations = WAVECOMP[name]
    report = evaluate(FOLDER / name)
    assert report.storage.params32 == pytest.approx(storage, rel=0.03)
    assert report.math.ops32 == pytest.approx(math, rel=0.03)
    assert report.score.total == pytest.approx(score, rel=0.03)
    assert [claim.holds for claim in report.claims] == [True, True, True, None]
    assert "CIFAR-100 not found in" in report.quality.reason
    assert "untrained" in report.provenance
    assert all(layer.input_bits <= 12 for layer in report.layers if layer.mults)
    assert {layer.weight_bits for layer in report.layers if layer.op == "aten.convolution"} == {bits}
    before = read_manifest(FOLDER / name).provenance.steps[-2]
    assert before.parameters == pytest.approx(parameters, rel=0.01)
    assert before.nonzeros == pytest.approx(nonzeros, rel=0.01)
    assert before.mults + before.adds == pytest.approx(operations, rel=0.01)


@pytest.mark.parametrize("name", [*WAVECOMP, "digits"])
def test_the_counted_bits_are_the_bits_of_the_file(name):
    storage = evaluate_costs(name)
    packed = packing.read(FOLDER / name / "weights.safetensors")
    counted = (storage.value_bits, storage.mask_bits, storage.overhead_bits)
    assert all(bits <= size < bits + 8 for bits, size in zip(counted, packed.bits.values(), strict=True))
    assert storage.file_bytes <= 1.02 * storage.bits / 8 + 65536


def evaluate_costs(name):
    return evaluate(FOLDER / name, data=FOLDER).storage


def test_digits_is_small_and_good():
    report = evaluate(FOLDER / "digits")
    assert report.passed
    assert report.quality.passed
    assert report.quality.examples == 449
    assert report.score.total <= 0.05
    assert all(layer.weight_bits < 8 for layer in report.layers)


def test_submission_3_is_what_its_recipe_makes(tmp_path):
    compress(FOLDER / "3" / "recipe.toml", tmp_path / "3")
    made, ours = evaluate(tmp_path / "3"), evaluate(FOLDER / "3")
    # Other processors round other last digits, which can move a weight by one step of its grid.
    assert made.storage.params32 == pytest.approx(ours.storage.params32, rel=1e-3)
    assert made.math.ops32 == pytest.approx(ours.math.ops32, rel=1e-3)
    theirs = packing.read(FOLDER / "3" / "weights.safetensors").structure
    assert packing.read(tmp_path / "3" / "weights.safetensors").structure == theirs
