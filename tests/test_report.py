"""The report: its keys and schema, claims and thresholds at their limits, and the two functions of the library."""

import copy
import io
import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

import micronet_eval
from micronet_eval import evaluate, packing
from micronet_eval.evaluation import Report
from micronet_eval.report import render_many
from micronet_eval.task import DataMissing, Task

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "report.schema.json").read_text())

KEYS = {
    "": {"schema", "submission", "task", "storage", "math", "score", "quality", "claims", "layers", "ruleset",
         "isolation", "coverage", "environment", "warnings"},
    "storage": {"parameters", "nonzeros", "bits", "value_bits", "mask_bits", "overhead_bits", "params32", "file_bytes"},
    "math": {"mults", "adds", "ops32", "mult_ops32", "add_ops32", "macs"},
    "score": {"storage", "math", "total"},
    "quality": {"metric", "threshold", "claimed", "measured", "passed", "reason"},
    "claims": {"name", "claimed", "measured", "holds"},
    "layers": {"module", "op", "mults", "adds", "input_bits", "weight_bits", "ops32", "storage_bits"},
    "coverage": {"executed", "priced", "free"},
    "environment": {"python", "torch", "micronet-eval", "device"},
}  # fmt: skip

ROWS = 101


def two_inputs():
    """Which of two inputs is larger: 202 weights, counted as 16 bit, are 101 parameters; 202 products and 101 sums."""
    return nn.Sequential(nn.Linear(2, ROWS, bias=False)).eval()


@pytest.fixture
def judged(register, tmp_path):
    """The report on a model with just so many right answers, and a submission with just these claims."""

    register(architectures={"two-inputs": two_inputs})
    names = (f"fake-{number}" for number in range(9))

    def judged(claims="", right=1, total=1, threshold=0.0, storage=1000.0, math=1000.0, missing=False):
        def dataset(root, split):
            if missing:
                raise DataMissing("nobody has it")
            inputs = torch.tensor([[1.0, 0.0]]).repeat(total, 1)
            return TensorDataset(inputs, (torch.arange(total) >= right).long())

        name = next(names)
        task = Task(name, "", "none", storage, math, "top-1", threshold, (2,), dataset)
        register(tasks={name: task})
        model = two_inputs()
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[2.0, 1.0], [1.0, 2.0], *[[-1.0, -1.0]] * (ROWS - 2)]))
        packing.write(packing.pack(model, two_inputs(), torch.zeros(1, 2)), tmp_path / "weights.safetensors")
        (tmp_path / "submission.toml").write_text(
            f'name = "x"\ntask = "{name}"\nauthors = ["x"]\n'
            f'architecture = {{ name = "two-inputs" }}\n[claims]\n{claims}'
        )
        return micronet_eval.evaluate(tmp_path)

    return judged


# --- keys -------------------------------------------------------------------------------------------------------------


def test_the_schema_is_that_of_the_report():
    assert Report.model_json_schema(by_alias=True, mode="serialization") == SCHEMA


def test_a_report_fits_the_schema_and_has_all_keys(submission):
    manifest = submission / "submission.toml"
    manifest.write_text(manifest.read_text() + "\n[claims]\nstorage = 1\nquality = 0.5\n")
    report = json.loads(micronet_eval.evaluate(submission).to_json())
    jsonschema.validate(report, SCHEMA)
    for key, names in KEYS.items():
        part = report[key] if key else report
        for one in part if isinstance(part, list) else [part]:
            assert names <= set(one)
    assert (report["schema"], report["ruleset"]) == (1, "micronet-2019")
    assert [claim["name"] for claim in report["claims"]] == ["storage", "quality"]
    assert all(report["coverage"]["free"].values())


def test_the_schema_refuses_another_report(submission):
    report = json.loads(micronet_eval.evaluate(submission).to_json())
    report["math"]["ops32"] = "many"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, SCHEMA)


def test_the_parts_of_a_report_add_up(submission):
    report = micronet_eval.evaluate(submission)
    storage, math = report.storage, report.math
    assert storage.bits == storage.value_bits + storage.mask_bits + storage.overhead_bits
    # An exponent of an activation is not stored for an operation that has a price.
    activations = packing.read(submission / "weights.safetensors").structure.activations
    assert storage.bits == sum(layer.storage_bits for layer in report.layers) + 8 * len(activations)
    assert storage.params32 == storage.bits / 32
    assert math.ops32 == pytest.approx(math.mult_ops32 + math.add_ops32)
    assert math.ops32 == pytest.approx(sum(layer.ops32 for layer in report.layers))
    assert math.mults == sum(layer.mults for layer in report.layers)
    assert math.adds == sum(layer.adds for layer in report.layers)
    assert report.score.total == report.score.storage + report.score.math
    assert report.score.storage == storage.params32 / 690_922
    assert report.score.math == math.ops32 / 12_630_528


# --- claims -----------------------------------------------------------------------------------------------------------


def test_the_model_of_these_tests_costs_what_it_should(judged):
    report = judged()
    assert report.freebie
    assert (report.storage.params32, report.math.ops32) == (101.0, 202.0)
    assert report.claims == ()


@pytest.mark.parametrize(
    ("claims", "holds"),
    [
        ("storage = 101", True),
        ("storage = 100", True),  # 101 is exactly 1 % more
        ("storage = 1.00e2", True),
        ("storage = 99.999999", False),
        ("storage = 5000", True),
        ("math = 200", True),
        ("math = 199.9999999", False),
        ("math = 201", True),
        ("score = 0.3001", True),  # the score is 0.101 + 0.202 = 0.303
        ("score = 0.2999", False),
        ("score = 1.5", True),
    ],
)
@pytest.mark.rule("score.claims")
def test_a_cost_holds_up_to_one_percent_more(judged, claims, holds):
    (claim,) = judged(claims).claims
    assert (claim.name, claim.holds) == (claims.split()[0], holds)
    assert claim.claimed == float(claims.split()[2])
    assert claim.measured == pytest.approx({"storage": 101, "math": 202, "score": 0.303}[claim.name])


@pytest.mark.parametrize(("storage", "math", "claimed"), [(1e4, 2e4, "0.02"), (1e3, 1e4, "0.12"), (1e5, 1e5, "0.003")])
def test_a_score_exactly_at_the_limit_holds(judged, storage, math, claimed):
    assert judged(f"score = {claimed}", storage=storage, math=math).claims[0].holds


@pytest.mark.parametrize(
    ("claimed", "right", "total", "holds"),
    [
        ("0.8011", 8011, 10_000, True),
        ("0.8011", 8010, 10_000, True),
        ("0.8011", 8009, 10_000, False),
        ("0.8011", 16_019, 20_000, False),  # 0.80095 rounds to 0.8010, but is more than 0.0001 below the claim
        ("0.8010", 8009, 10_000, True),
        ("0.8011", 9999, 10_000, True),
        ("0.80110", 8010, 10_000, False),  # one digit more is printed
        ("0.80", 79, 100, True),
        ("0.80", 78, 100, False),
        ("0.8", 7, 10, True),
        ("0.7", 6, 10, True),
        ("0.7", 599, 1000, False),
        ("0.0004", 3, 10_000, True),
        ("1", 9, 10, True),
        ("1", 8, 10, False),
        ("1.0", 9, 10, True),
    ],
)
@pytest.mark.rule("score.claims")
def test_a_quality_holds_up_to_its_last_printed_digit(judged, claimed, right, total, holds):
    report = judged(f"quality = {claimed}", right, total)
    (claim,) = report.claims
    assert (claim.name, claim.claimed, claim.measured) == ("quality", float(claimed), right / total)
    assert claim.holds is holds
    assert report.quality.claimed == float(claimed)
    assert report.passed is holds


def test_a_claim_is_never_used_for_the_measurement(judged):
    silent, loud = judged(), judged("storage = 1\nmath = 1\nscore = 0.00001\nquality = 1.00", 0, 1)
    assert (loud.storage, loud.math, loud.score) == (silent.storage, silent.math, silent.score)
    assert loud.quality.measured == 0.0
    assert [claim.holds for claim in loud.claims] == [False] * 4
    assert not loud.passed


def test_what_is_not_measured_neither_holds_nor_fails(judged, run, tmp_path):
    report = judged("storage = 101\nquality = 0.9", threshold=0.9, missing=True)
    assert [(claim.name, claim.holds) for claim in report.claims] == [("storage", True), ("quality", None)]
    assert report.claims[1].measured is None
    assert (report.quality.measured, report.quality.passed, report.quality.examples) == (None, None, 0)
    assert (report.quality.claimed, report.quality.reason) == (0.9, "nobody has it")
    assert report.passed is None and report.claims_held is None
    status, out, _ = run(tmp_path)
    assert status == 0
    assert "not measured" in out
    assert judged("storage = 101", missing=True).claims_held is True
    assert judged("storage = 1", missing=True).passed is False


# --- width ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [False, True])
def test_a_table_of_several_leaves_columns_out_until_it_fits(judged, failing):
    """Texts of 10 + 8 + 3 x 7 + 12 + 11 columns and 8 borders, 22 more with blanks: 84; without math 74, and so on."""
    report = judged("storage = 101\nquality = 0.9", missing=True)
    claims = [claim.model_copy(update={"holds": False}) for claim in report.claims for _ in range(3)]
    wide = report.model_copy(update={"task": "cifar100", "claims": tuple(claims if failing else report.claims)})
    for width in range(40, 101):
        console = Console(width=width, file=io.StringIO())
        console.print(render_many([wide, wide], width))
        _, top, head, *rows, bottom = console.file.getvalue().splitlines()
        lines = [top, head, *rows, bottom]
        assert len({len(line) for line in lines}) == 1 and len(top) <= width
        assert {line[-1] for line in lines} == {"┓", "┃", "┩", "│", "┘"}
        assert failing or sum("1 of 2 hold" in row for row in rows) == (2 if width >= 53 else 0)
        shown = [name.strip() for name in head.strip("┃").split("┃")]
        least = {"math": 84, "storage": 74, "task": 64, "claims": 53}
        assert failing or shown == [
            name
            for name in ("submission", "task", "storage", "math", "score", "quality", "claims")
            if width >= least.get(name, 0)
        ]


# --- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "total", "enough"),
    [(0.97, 449, 436), (0.8, 10, 8), (0.80, 10_000, 8_000), (0.7, 10, 7), (0.07, 100, 7), (0.29, 100, 29), (1.0, 3, 3)],
)
@pytest.mark.rule("score.threshold")
def test_a_threshold_counts_whole_examples(judged, threshold, total, enough):
    few, many = judged("", enough - 1, total, threshold), judged("", enough, total, threshold)
    assert (few.quality.passed, few.passed) == (False, False)
    assert (many.quality.passed, many.passed) == (True, True)
    assert (many.quality.measured, many.quality.examples) == (enough / total, total)
    assert many.quality.reason == f"{enough:,} of {total:,} correct"


def test_the_quality_is_told_while_it_is_measured(judged, tmp_path):
    judged("", 200, 250)
    told = []
    micronet_eval.evaluate(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(100, 250), (200, 250), (250, 250)]


# --- the library ------------------------------------------------------------------------------------------------------


def test_evaluate_returns_the_report_that_the_command_prints(run, submission):
    report = micronet_eval.evaluate(str(submission))
    assert isinstance(report, micronet_eval.Report)
    assert json.loads(run(submission, "--format", "json")[1]) == json.loads(report.to_json())


def test_evaluate_changes_no_file(submission):
    before = {path: path.read_bytes() for path in submission.iterdir()}
    micronet_eval.evaluate(submission)
    assert {path: path.read_bytes() for path in submission.iterdir()} == before


def test_evaluate_knows_the_submission_by_its_folder(submission, monkeypatch):
    monkeypatch.chdir(submission)
    assert micronet_eval.evaluate(".").submission == "small"
    assert micronet_eval.evaluate(".").storage.file_bytes == (submission / "weights.safetensors").stat().st_size


def test_score_returns_the_report_that_count_prints(run):
    from torchvision.models import resnet18

    with torch.device("meta"):
        model = resnet18()
    report = micronet_eval.score(model, torch.zeros(1, 3, 64, 64), task="imagenet")
    words = ("torchvision:resnet18", "--input", "1x3x64x64", "--task", "imagenet", "--format", "json")
    printed = json.loads(run("count", *words)[1])
    assert report.submission == "ResNet"
    assert printed == {**json.loads(report.to_json()), "submission": "torchvision:resnet18"}
    assert report.score.storage == report.storage.params32 / 6.9e6
    assert report.score.math == report.math.ops32 / 1170e6
    assert report.quality.measured is None
    assert (report.passed, report.claims_held, report.claims) == (None, None, ())


@pytest.mark.parametrize("training", [True, False])
def test_score_leaves_the_module_alone(training):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()).train(training)
    model[2].eval()
    before = copy.deepcopy(model)
    report = micronet_eval.score(model, torch.randn(1, 3, 8, 8))
    assert report.score is None
    assert report.math.macs == 4 * 27 * 36
    assert repr(model) == repr(before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    after = model.state_dict()
    assert list(after) == list(before.state_dict())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.state_dict().items())
    assert not model._forward_hooks
    assert not model[0]._forward_hooks


def test_score_of_an_unknown_task():
    with pytest.raises(micronet_eval.errors.InputError, match="unknown task 'digit'; nearest: digits"):
        micronet_eval.score(nn.Linear(2, 2), torch.zeros(1, 2), task="digit")


def test_the_names_of_the_library():
    for name in micronet_eval.__all__:  # every name is there, and no room takes the place of a function
        assert callable(getattr(micronet_eval, name)) or name == "RULES"
    with pytest.raises(AttributeError, match="has no attribute 'evalute'"):
        _ = micronet_eval.evalute
    assert set(micronet_eval.__all__) <= set(dir(micronet_eval))


def test_a_kind_that_is_none_in_python(tmp_path):
    with pytest.raises(micronet_eval.InputError, match=r"^unknown kind 'pruners'; nearest: pruner"):
        micronet_eval.registered("pruners")
    with pytest.raises(micronet_eval.InputError, match=r"^unknown kind of strategy 'task'; known: pruner, "):
        micronet_eval.new_plugin("task", "x", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: micronet_eval.compress(f"{folder}/recipe.toml", f"{folder}/made"),
        lambda folder: micronet_eval.train_only(f"{folder}/recipe.toml", f"{folder}/made"),
        lambda folder: micronet_eval.search(f"{folder}/recipe.toml", micronet_eval.Search()),
        lambda folder: micronet_eval.reproduce(folder),
        lambda folder: micronet_eval.import_weights(folder, f"{folder}/weights.pt", f"{folder}/made"),
        lambda folder: micronet_eval.new_plugin("pruner", "my-pruner", folder),
    ],
)
def test_functions_take_paths_as_text(tmp_path, call):
    with pytest.raises(micronet_eval.errors.InputError, match=str(tmp_path)):
        call(str(tmp_path))


def test_what_is_wrong_with_a_submission_in_python(tmp_path):
    assert [finding.rule for finding in micronet_eval.validate(str(tmp_path / "none"))] == ["folder.exists"]


def test_every_command_is_a_function_and_told():
    import click

    from micronet_eval.cli import cli

    told = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    shown = set(re.findall(r"`(?:micronet-eval )?([a-z]+)[ `]", told)) | {"evaluate"}  # which is the default
    assert set(cli.list_commands(click.Context(cli))) <= shown
    assert set(re.findall(r"`mn\.(\w+)", told)) <= set(micronet_eval.__all__)


def test_a_notebook_shows_the_figures_and_no_markup_of_others(submission):
    report = evaluate(submission).model_copy(update={"submission": "<script>alert(1)</script>"})
    html = report._repr_html_()
    assert "<script>" not in html
    assert f"{report.score.total:.6g}" in html
    assert f"{report.quality.measured:.2%}" in html


def test_the_operations_as_a_frame(submission):
    pytest.importorskip("pandas")
    report = evaluate(submission)
    frame = report.to_frame()
    assert len(frame) == len(report.layers)
    assert frame["ops32"].sum() == pytest.approx(report.math.ops32)


def test_a_report_explains_itself_until_it_is_read_from_a_file(submission):
    report = evaluate(submission)
    found = report.explain("0")
    assert found == micronet_eval.explain(submission, "0")
    assert sum(e.mults for e in report.explain()) == report.math.mults
    assert sum(e.storage_bits for e in report.explain()) == report.storage.bits
    read = type(report).model_validate_json(report.to_json())
    with pytest.raises(micronet_eval.errors.InputError, match="was read from a file; evaluate again"):
        read.explain("0")
    with pytest.raises(micronet_eval.errors.InputError, match="unknown module 'nope'"):
        report.explain("nope")
