"""The command line: reports, exit status, and one clear message for every bad input."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

from micronet_eval import packing
from micronet_eval.evaluation import Report, evaluate
from micronet_eval.hookspecs import hookimpl
from micronet_eval.plugins import manager
from micronet_eval.recipe import compress
from micronet_eval.submission import build, read_manifest

ROOT = Path(__file__).parent.parent
DOT_PRODUCTS = ("aten.convolution", "aten.addmm")
MANIFEST, WEIGHTS = "submission.toml", "weights.safetensors"


@pytest.fixture
def refused(run):
    """Runs the command and gives the one message of bad input."""

    def refused(*words):
        status, out, err = run(*words)
        assert (status, out) == (2, "")
        assert err.startswith("micronet-eval: ")
        assert "Traceback" not in err
        return err

    return refused


def edit(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def rewrite(folder, change):
    """Packs the folder's weights again after `change` has altered streams, structure or plain tensors."""
    packed = packing.read(folder / WEIGHTS)
    structure, streams, plain = change(packed.structure.model_dump(), dict(packed.streams), {})
    changed = packing.Packed(packing.Structure.model_validate(structure), streams, plain)
    packing.write(changed, folder / WEIGHTS)


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['micronet-eval', '--help']\nfrom micronet_eval.cli import main\n"
    code += "try: main()\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_missing_folder(refused):
    assert "nowhere is no folder" in refused("nowhere")


def test_a_folder_without_manifest(refused, tmp_path):
    assert f"{tmp_path / MANIFEST} is missing" in refused(tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "small"', "name = ", "no valid TOML"),
        ('name = "small"\n', "", "field 'name': Field required (add this field)"),
        ('name = "small"\n', 'name = "small"\ncolour = 1\n', "field 'colour': Extra inputs are not permitted"),
        ('authors = [\n    "test",\n]', "authors = 3", "field 'authors'"),
        ('task = "digits"', 'task = "digit"', "field 'task': unknown task 'digit'; nearest: digits"),
        ('name = "wide-resnet"', 'name = "wide-resnets"', "unknown architecture 'wide-resnets'; nearest: wide-resnet"),
        ("depth = 10", "depth = 11", "field 'architecture': depth 11"),
        ("depth = 10", "depth = 10\nsize = 1", "field 'architecture.size': unknown option 'size'; known: depth"),
        ("width = 1", "width = 2", "the weights do not fit"),
    ],
)
def test_a_broken_manifest(refused, submission, before, after, message):
    edit(submission / MANIFEST, before, after)
    error = refused(submission)
    assert message in error
    assert str(submission) in error


def test_missing_weights(refused, submission):
    (submission / WEIGHTS).unlink()
    assert "weights.safetensors is missing" in refused(submission)


def test_truncated_weights(refused, submission):
    data = (submission / WEIGHTS).read_bytes()
    (submission / WEIGHTS).write_bytes(data[: len(data) // 2])
    assert "truncated or damaged" in refused(submission)


def test_a_flipped_bit(refused, submission):
    data = bytearray((submission / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (submission / WEIGHTS).write_bytes(bytes(data))
    assert "checksum" in refused(submission)


def test_a_safetensors_file_of_another_kind(refused, submission):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, submission / WEIGHTS)
    assert "no packed model" in refused(submission)


def test_more_data_than_tensors(refused, submission):
    def change(structure, streams, plain):
        return structure, {**streams, "values": np.append(streams["values"], np.uint8(0))}, plain

    rewrite(submission, change)
    assert "more data than the tensors take" in refused(submission)


def test_less_data_than_tensors(refused, submission):
    rewrite(
        submission, lambda structure, streams, plain: (structure, {**streams, "values": streams["values"][:-9]}, plain)
    )
    assert "the data ends too early" in refused(submission)


def first_as_plain(spec, value):
    """Declares the classifier's bias as an ordinary tensor, to be read before all others."""

    def change(structure, streams, plain):
        name = [name for name, _, _ in structure["tensors"] if name.endswith(".bias")][-1]
        others = [entry for entry in structure["tensors"] if entry[0] != name]
        structure["tensors"] = [(name, spec, "plain"), *others]
        return structure, streams, {name: torch.full((10,), value)}

    return change


def test_a_value_off_its_declared_grid(refused, submission):
    rewrite(submission, first_as_plain("fixed-point:8", 0.12345678))
    assert "is not on the grid of fixed-point:8" in refused(submission)


def test_nan_weights(refused, submission):
    rewrite(submission, first_as_plain("float32", float("nan")))
    assert "holds NaN or infinity" in refused(submission)


def all_plain(folder, without=""):
    """Gives every weight as an ordinary float32 tensor; only the exponents of activations stay packed."""
    manifest = read_manifest(folder)
    model = packing.unpack(packing.read(folder / WEIGHTS), build(manifest.architecture, folder))

    def change(structure, streams, plain):
        exponents = [name for name, _, layout in structure["tensors"] if layout == "overhead"]
        weights = [name for name, _, layout in structure["tensors"] if layout != "overhead" and name != without]
        owner = {name: model.get_submodule(name.rpartition(".")[0]) for name in exponents + weights}
        value = {name: getattr(module, name.rpartition(".")[2]).detach() for name, module in owner.items()}
        structure["tensors"] = [(name, "float32", "plain") for name in weights]
        structure["tensors"] += [(name, "int8", "overhead") for name in exponents]
        empty = np.zeros(0, np.uint8)
        overhead = np.array([int(value[name]) for name in exponents], np.int8).view(np.uint8)
        return (
            structure,
            {"values": empty, "masks": empty, "overhead": overhead},
            {n: value[n].clone() for n in weights},
        )

    rewrite(folder, change)


def test_plain_tensors_are_read_and_counted_as_declared(submission):
    before = evaluate(submission)
    all_plain(submission)
    after = evaluate(submission)
    assert (after.math.mults, after.math.adds) == (before.math.mults, before.math.adds)
    assert after.quality.measured == before.quality.measured
    assert after.storage.value_bits > 3.5 * before.storage.value_bits


def test_a_tensor_that_the_file_lacks(refused, submission):
    names = [name for name, _, _ in packing.read(submission / WEIGHTS).structure.tensors]
    all_plain(submission, without=names[-1])
    assert f"lacks 1 tensors that the model uses, the first is {names[-1]!r}" in refused(submission)


def test_an_operation_without_a_formula(refused, submission):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.i0(x)

    class Plugin:
        @hookimpl
        def micronet_register_architectures(self, register):
            register("odd", Odd)

    plugin = Plugin()
    manager().register(plugin)
    try:
        manifest = (submission / MANIFEST).read_text().partition("[architecture]")[0]
        (submission / MANIFEST).write_text(manifest + '[architecture]\nname = "odd"\n')
        empty = np.zeros(0, np.uint8)
        rewrite(
            submission,
            lambda structure, streams, plain: (
                {"tensors": []},
                dict.fromkeys(("values", "masks", "overhead"), empty),
                {},
            ),
        )
        assert "no cost formula for operation aten.i0" in refused(submission)
    finally:
        manager().unregister(plugin)


def test_two_plugins_with_one_name(refused):
    class Plugin:
        @hookimpl
        def micronet_register_tasks(self, register):
            register("digits", None)

    plugin = Plugin()
    manager().register(plugin)
    try:
        assert "the task 'digits' is registered by both" in refused("tasks")
    finally:
        manager().unregister(plugin)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("count", "torchvision:resnet19", "--input", "1x3x8x8"),
            "unknown torchvision model 'resnet19'; nearest: resnet1",
        ),
        (("count", "torchvision:resnet18", "--input", "1x3x"), "--input '1x3x' is no shape"),
        (("count", "torchvision:resnet18", "--input", "1x5x64x64"), "the model does not run on input 1x5x64x64"),
        (("count", "nonsense", "--input", "1"), "names no model"),
        (("count", "no_such_module:f", "--input", "1"), "cannot find 'no_such_module:f'"),
        (("strategies", "low-rang"), "unknown strategy 'low-rang'; nearest: low-rank"),
    ],
)
def test_bad_arguments(refused, words, message):
    assert message in refused(*words)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('pruner = "low-rank"', 'pruner = "low-rang"', "unknown pruner 'low-rang'; nearest: low-rank"),
        ("parameters = 40_000", "parameters = -1", "option 'parameters'"),
        ("parameters = 40_000", "parameters = 1", "1 parameters cannot be reached"),
        ('merge = "batch-norm"', 'merge = "batch-norm"\npruner = "low-rank"', "exactly one of"),
        ('data = "noise"', 'data = "some"', "field 'data'"),
        ('task = "digits"\ndata = "noise"', 'task = "cifar100"', "CIFAR-100 not found in data/cifar-100-python"),
    ],
)
def test_a_broken_recipe(refused, submission, tmp_path, monkeypatch, before, after, message):
    monkeypatch.chdir(tmp_path)
    recipe = submission / "recipe.toml"
    edit(recipe, before, after)
    status_message = refused_after_log(refused, recipe, tmp_path / "out")
    assert message in status_message
    assert not (tmp_path / "out").exists()


def refused_after_log(refused, recipe, folder):
    """Stages before the faulty one may already have logged their progress."""
    try:
        return refused("compress", recipe, "-o", folder)
    except AssertionError:
        from micronet_eval.errors import InputError

        with pytest.raises(InputError) as error:
            compress(recipe, folder)
        return str(error.value)


def test_a_report_as_json_fits_its_schema(run, submission):
    status, out, _ = run(submission, "--format", "json")
    report = json.loads(out)
    schema = json.loads((ROOT / "docs/report.schema.json").read_text())
    jsonschema.validate(report, schema)
    assert schema == Report.model_json_schema(by_alias=True, mode="serialization")
    assert status == 1  # an untrained network does not reach the threshold
    assert report["quality"]["passed"] is False
    assert report["quality"]["examples"] == 449
    assert json.loads(run(submission, "--format", "json")[1]) == report


@pytest.mark.parametrize(
    ("name", "told"), [("nowhere", "nowhere is no folder"), ("x" * 300, "xxx: File name too long")]
)
def test_several_folders_give_a_table_and_a_broken_one_its_message(run, submission, tmp_path, name, told):
    status, out, err = run(submission, tmp_path / name)
    assert status == 2
    assert "small" in out
    assert told in err


@pytest.mark.parametrize("width", ["60", "200"])
def test_tables_cut_no_figure(run, submission, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    out = run(submission, "--layers")[1]
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= int(width)
    assert f"{evaluate(submission).storage.bits:,} bits" in out


def test_count_has_the_keys_of_a_report(run):
    status, out, _ = run("count", "torchvision:resnet18", "--input", "1x3x64x64", "--format", "json")
    report = json.loads(out)
    assert status == 0
    assert report["math"]["macs"] == sum(x["mults"] for x in report["layers"] if x["op"] in DOT_PRODUCTS)
    assert report["storage"]["parameters"] == 11_684_712  # 11,689,512 less two of four values a batch norm merges
    assert len(report["layers"]) == report["coverage"]["priced"]


def test_csv_and_markdown(run, submission):
    assert run(submission, "--format", "csv")[1].splitlines()[1].startswith("small,digits,")
    assert run(submission, "--format", "markdown")[1].startswith("| submission | task |")


def test_a_failing_claim_gives_exit_status_1(run, submission):
    edit(submission / MANIFEST, "[architecture]", "[claims]\nscore = 0.0001\n\n[architecture]")
    status, out, _ = run(submission)
    assert status == 1
    assert "fails" in out


def test_the_same_recipe_gives_the_same_files(made, tmp_path):
    compress(made / "recipe.toml", tmp_path / "again")
    for name in (MANIFEST, WEIGHTS, "recipe.toml"):
        assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes()
