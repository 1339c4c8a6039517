"""The command line: what each command prints, in which form, and with which exit status."""

import csv
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

from micronet_eval import cli, evaluate, score
from micronet_eval.isolation import Limits
from micronet_eval.plugins import lookup
from micronet_eval.strategy import Quantizer
from micronet_eval.tables import to_markdown
from micronet_eval.task import DataMissing

COMMAND = Path(sys.executable).with_name("micronet-eval")
ENTRIES = ["strategies", "tasks", "architectures"]


def claim(folder, text):
    (folder / "submission.toml").write_text((folder / "submission.toml").read_text() + f"\n[claims]\n{text}\n")


def without_environment(text):
    report = json.loads(text)
    del report["environment"]
    return json.dumps(report, indent=2)


@pytest.fixture
def on_task(submission, register):
    """Puts the submission on a task that is digits but for some changes."""

    def on_task(name, **changes):
        register(tasks={name: replace(lookup("task", "digits"), name=name, **changes)})
        manifest = submission / "submission.toml"
        manifest.write_text(manifest.read_text().replace('task = "digits"', f'task = "{name}"'))
        return submission

    return on_task


@pytest.fixture
def easy(on_task):
    """A tenth of the examples is right by chance."""
    return on_task("easy", threshold=0.01)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["count", "--help"], ["evaluate", "--help"], []])
def test_help_does_not_import_torch(words):
    code = (
        f"import sys; sys.argv = ['micronet-eval', *{words}]\n"
        "from micronet_eval.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Traceback" not in ended.stderr
    assert ended.returncode == (0 if words else 2)


def test_help_names_every_command(run):
    status, out, _ = run("-h")
    assert status == 0
    assert all(f"\n  {name}" in out for name in cli.cli.commands)
    assert {"evaluate", "compress", "count", *ENTRIES} <= set(cli.cli.commands)


def test_version(run):
    status, out, _ = run("--version")
    assert status == 0
    assert version("micronet-eval") in out


def test_a_wrong_option_gives_exit_status_2(run):
    status, _, err = run("count", "torchvision:resnet18", "--input", "1", "--format", "yaml")
    assert status == 2
    assert "'yaml' is not one of 'table', 'json', 'csv', 'markdown'" in err


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_is_the_default_command(run, submission):
    short = run(submission, "--format", "json")
    assert short == run("evaluate", submission, "--format", "json")
    assert json.loads(short[1])["submission"] == "small"


@pytest.mark.parametrize(
    ("word", "meant"), [("evaluat", "evaluate"), ("strategys", "strategies"), ("chekc", "check"), ("dif", "diff")]
)
def test_a_mistyped_command_is_no_folder(run, submission, monkeypatch, tmp_path, word, meant):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("micronet_eval.evaluation.evaluate", None)
    for words in ([word, submission], [word]):
        status, out, err = run(*words)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"micronet-eval: unknown command '{word}'; nearest: {meant}")


def test_a_folder_may_have_the_name_of_a_mistyped_command(run, easy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(easy, "evaluat")
    assert run("evaluat")[0] == 0
    assert "nowhere is no folder" in run("nowhere")[2]  # near no command


def test_json_is_the_report(run, submission):
    _, out, err = run(submission, "--format", "json")
    assert err == ""
    assert out == evaluate(submission).to_json() + "\n"


def test_two_runs_print_the_same_bytes(run, submission):
    ended = subprocess.run(
        [COMMAND, submission, "--format", "json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert without_environment(run(submission, "--format", "json")[1]) == without_environment(ended.stdout)


def test_a_table_says_what_was_measured_and_claimed(run, submission):
    claim(submission, "storage = 20_000\nscore = 0.02")
    _, out, _ = run(submission)
    report = evaluate(submission)
    assert f"{report.storage.params32:,.0f}" in out
    assert "20,000" in out
    assert f"{report.score.total:.6g}" in out
    assert f"{report.storage.file_bytes:,} bytes in the file" in out
    assert report.quality.reason in out
    assert ">= 0.97 FAILED" in out
    assert re.search(r"^params32 .* holds *$", out, re.MULTILINE)
    assert re.search(r"^score .* fails *$", out, re.MULTILINE)


def test_csv(run, submission):
    _, out, _ = run(submission, "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(out))
    report = evaluate(submission)
    assert row["submission"] == "small"
    assert float(row["params32"]) == report.storage.params32
    assert float(row["ops32"]) == report.math.ops32
    assert float(row["score"]) == report.score.total
    assert float(row["quality"]) == report.quality.measured
    assert (row["passed"], row["claims"]) == ("False", "")  # nothing is claimed


def test_a_failed_claim_is_no_failed_threshold_in_rows(run, easy):
    claim(easy, "math = 1000")
    (row,) = csv.DictReader(io.StringIO(run(easy, "--format", "csv")[1]))
    assert (row["passed"], row["claims"]) == ("True", "failed")
    assert run(easy, "--format", "markdown")[1].endswith(" | True | failed |\n")


def test_what_was_not_measured_is_empty_in_rows(run, on_task):
    def nowhere(root, split):
        raise DataMissing("no data")

    folder = on_task("absent", dataset=nowhere)
    claim(folder, "storage = 20_000")
    for style, end in [("csv", ",,,held\n"), ("markdown", " |  |  | held |\n")]:
        status, out, _ = run(folder, "--format", style)
        assert status == 0 and out.endswith(end)
    claim(folder, "")
    manifest = folder / "submission.toml"
    manifest.write_text(manifest.read_text().replace("\n[claims]\n\n", "quality = 0.99\n"))
    assert run(folder, "--format", "csv")[1].endswith(",,,\n")
    assert run("count", "torchvision:resnet18", "--input", "1x3x64x64", "--format", "csv")[1].endswith(",,,,,,\n")


def test_markdown(run, submission):
    head, line, row = run(submission, "--format", "markdown")[1].splitlines()
    assert head == "| submission | task | params32 | ops32 | storage | math | score | quality | passed | claims |"
    assert line == "| " + " | ".join(["---"] * 10) + " |"
    assert row.startswith(f"| small | digits | {evaluate(submission).storage.params32} | ")


def test_what_markdown_would_obey_is_text():
    table = to_markdown([{"a_b|": "c\\|d <b>\n`e`", "*": None}])
    assert table.splitlines() == [r"| a\_b\| | \* |", "| --- | --- |", r"| c\\\|d \<b\> \`e\` |  |"]


def test_several_folders_are_one_table(run, submission, tmp_path):
    other = shutil.copytree(submission, tmp_path / "other")
    status, out, err = run(submission, other)
    assert (status, err) == (1, "")
    assert out.count("Submissions") == 1
    assert [row.split()[1] for row in out.splitlines() if "digits" in row] == ["small", "other"]
    reports = json.loads(run(submission, other, "--format", "json")[1])
    assert [report["submission"] for report in reports] == ["small", "other"]
    assert len(run(submission, other, "--format", "csv")[1].splitlines()) == 3


def test_a_broken_folder_among_others_gives_its_message(run, easy, tmp_path):
    broken = shutil.copytree(easy, tmp_path / "broken")
    (broken / "weights.safetensors").unlink()
    other = shutil.copytree(easy, tmp_path / "other")
    status, out, err = run(easy, broken, other)
    assert status == 2
    assert err == f"micronet-eval: {broken / 'weights.safetensors'} is missing: a submission needs its packed weights\n"
    assert [row.split()[1] for row in out.splitlines() if "easy" in row] == ["small", "other"]


def test_layers_shows_every_operation(run, submission, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    few, every = run(submission)[1], run(submission, "--layers")[1]
    modules = {layer.module for layer in evaluate(submission).layers}
    assert len(evaluate(submission).layers) > 10
    assert f"The 10 costliest of {len(evaluate(submission).layers)} operations" in few
    assert "All priced operations" in every
    shown = every.partition("All priced operations")[2]
    assert all(re.search(rf"^ *{re.escape(module)} ", shown, re.MULTILINE) for module in modules if module)
    assert every.count("\n") - few.count("\n") == len(evaluate(submission).layers) - 10


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["F", "--layers", "--format", "csv"], "--layers is not shown by --format csv"),
        (["F", "--cross-check", "--format", "markdown"], "--cross-check is not shown by --format markdown"),
        (["F", "F", "--layers"], "--layers is not shown by a table of several submissions"),
        (["F", "F", "--cross-check"], "--cross-check is not shown by a table of several submissions"),
        (["count", "torchvision:resnet18", "--input", "1x3x64x64", "--depth", "1", "--layers"], "by --depth"),
        (["count", "torchvision:resnet18", "--input", "1x3x64x64", "--depth", "0", "--cross-check"], "by --depth"),
    ],
)
def test_what_would_not_be_shown_is_refused_before_anything_is_measured(run, submission, monkeypatch, words, told):
    monkeypatch.setattr("micronet_eval.evaluation.evaluate", None)
    monkeypatch.setattr("micronet_eval.targets.count", None)
    status, out, err = run(*(submission if word == "F" else word for word in words))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert told in err and "or write --format json" in err


def test_json_shows_all_that_is_asked_for(run, submission):
    words = ["torchvision:resnet18", "--input", "1x3x64x64", "--depth", "1", "--layers", "--cross-check"]
    report = json.loads(run("count", *words, "--format", "json")[1])
    assert report["breakdown"] and len(report["layers"]) == report["coverage"]["priced"] and report["cross_check"]
    assert len(json.loads(run(submission, submission, "--layers", "--format", "json")[1])) == 2


# --- exit status ------------------------------------------------------------------------------------------------------


def test_exit_status_0_where_all_is_well(run, easy):
    claim(easy, "storage = 20_000")
    status, out, err = run(easy)
    assert (status, err) == (0, "")
    assert "passed" in out


def test_exit_status_1_where_a_claim_fails(run, easy):
    claim(easy, "math = 1000")
    status, out, err = run(easy)
    assert (status, err) == (1, "")
    assert "fails" in out


def test_exit_status_1_where_the_threshold_fails(run, submission):
    status, out, err = run(submission)
    assert (status, err) == (1, "")
    assert ">= 0.97 FAILED" in out


def test_exit_status_0_where_quality_cannot_be_measured(run, on_task):
    def nowhere(root, split):
        raise DataMissing(f"no data in {root}")

    folder = on_task("absent", dataset=nowhere)
    claim(folder, "quality = 0.99")
    status, out, err = run(folder, "--data", "somewhere")
    assert (status, err) == (0, "")
    assert "not measured: no data in somewhere; claimed 99.00%" in " ".join(out.split())


@pytest.mark.parametrize("words", [["evaluate"], ["leaderboard"], ["check"], ["compare"]])
def test_exit_status_2_where_a_name_is_too_long(run, words):
    name = "a" * 300
    status, out, err = run(*words, name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"micronet-eval: {name}")
    assert err.endswith(": File name too long\n")


def test_a_name_that_is_too_long_is_a_finding(run):
    status, out, err = run("validate", "a" * 300, "--format", "csv")
    assert (status, err) == (2, "")
    assert "folder.exists" in out and "File name too long" in out


@pytest.mark.parametrize("command", ["evaluate", "leaderboard", "compare"])
def test_a_folder_for_pages_is_looked_at_before_anything_is_measured(run, submission, tmp_path, monkeypatch, command):
    monkeypatch.setattr("micronet_eval.evaluation.evaluate", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for name, told in [("full", "holds no pages of this program"), ("a" * 300, "File name too long")]:
        status, out, err = run(command, submission, "--html", tmp_path / name)
        assert (status, out) == (2, "")
        assert told in err and "name another folder by --html" in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk to write to")
@pytest.mark.parametrize("words", [["tasks"], ["tasks", "--format", "json"], ["--version"]])
def test_exit_status_2_where_the_disk_is_full(words, unbuffered):
    told = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True, env=told)
    assert (ended.returncode, ended.stderr) == (2, "micronet-eval: No space left on device\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["tasks"], 0),
        (["tasks", "--format", "csv"], 0),
        (["--help"], 0),
        (["validate", "nowhere"], 2),
        (["strategies", "nope"], 2),
    ],
)
def test_a_reader_who_has_seen_enough_is_no_error(words, status, unbuffered):
    reads, writes = os.pipe()
    os.close(reads)
    told = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run([COMMAND, *words], stdout=writes, stderr=subprocess.PIPE, text=True, env=told)
    both = subprocess.run([COMMAND, *words], stdout=writes, stderr=writes, env=told)
    os.close(writes)
    assert (ended.returncode, both.returncode) == (status, status)
    assert ("unknown strategy" in ended.stderr) == (words == ["strategies", "nope"])
    assert "Exception" not in ended.stderr and "pipe" not in ended.stderr


@pytest.mark.parametrize("words", [["tasks"], ["validate", "nowhere"]])
def test_output_that_is_closed_is_left_out(words):
    ended = subprocess.run(["sh", "-c", f"'{COMMAND}' {' '.join(words)} >&-"], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (2 * (words[0] == "validate"), "")


# --- count ------------------------------------------------------------------------------------------------------------


def test_count_as_json(run):
    status, out, err = run("count", "torchvision:resnet18", "--input", "1x3x64x64", "--format", "json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["submission"] == "torchvision:resnet18"
    assert (report["task"], report["score"], report["quality"]) == (None, None, None)
    # torchvision's 1.814 GMACs are at 224x224; every layer has (64 / 224)^2 = 4 / 49 of the positions here.
    convolutions = sum(layer["mults"] for layer in report["layers"] if layer["op"] == "aten.convolution")
    assert convolutions == 1_813_561_344 // 49 * 4
    assert report["math"]["macs"] == convolutions + 512 * 1000
    assert report["storage"]["parameters"] == 11_689_512 - 4_800  # each batch norm became one bias of its convolution
    assert report["storage"]["file_bytes"] is None
    assert len(report["layers"]) == report["coverage"]["priced"]


def test_count_as_table(run):
    status, out, _ = run("count", "torchvision:resnet18", "--input", "1x3x64x64")
    assert status == 0
    assert out.startswith("torchvision:resnet18 · micronet-2019")
    assert "11,684,712 values" in out
    assert "148,557,824 in dot products" in out


def test_count_of_a_function_in_the_current_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    package = tmp_path / "my_models" / "small"
    package.mkdir(parents=True)
    (package / "nets.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(7, 3)\n")
    target = "my_models.small.nets:build"
    status, out, _ = run("count", target, "--input", "5x7", "--format", "json", "--task", "digits")
    assert status == 0
    expected = score(nn.Linear(7, 3), torch.zeros(5, 7), task="digits")
    assert expected.math.macs == 5 * 7 * 3
    assert json.loads(out) == {**json.loads(expected.to_json()), "submission": target}


# --- lists ------------------------------------------------------------------------------------------------------------

QUANTIZERS = (
    "fixed-point", "affine", "lsq", "binary", "ternary", "codebook", "gptq", "mixed", "torchao", "brevitas",
    "accumulators",
)  # fmt: skip


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("strategies", {"low-rank": "pruner", "magnitude": "sparsifier", "fixed-point": "quantizer"}),
        ("tasks", {"cifar100": None, "imagenet": None, "digits": None, "fashion-mnist": None, "wikitext103": None}),
        (
            "architectures",
            dict.fromkeys(
                ("pyramidnet", "wide-resnet", "mobilenet-v2", "osi-ai", "torchvision", "lstm-lm", "transformer-lm")
            ),
        ),
    ],
)
def test_lists_of_what_is_installed(run, command, names):
    status, out, err = run(command, "--format", "json")
    rows = json.loads(out)
    assert (status, err) == (0, "")
    assert set(names.items()) <= {(row["name"], row.get("kind")) for row in rows}
    assert len({(row["name"], row.get("kind")) for row in rows}) == len(rows)
    assert all(row["package"] == f"micronet-eval {version('micronet-eval')}" for row in rows)
    listed = [row["name"] for row in csv.DictReader(io.StringIO(run(command, "--format", "csv")[1]))]
    assert listed == [row["name"] for row in rows]
    table, markdown = run(command)[1], run(command, "--format", "markdown")[1]
    assert all(name in table and f"| {name} |" in markdown for name in names)


def test_tasks_are_numbers_for_programs(run):
    (digits,) = [row for row in json.loads(run("tasks", "--format", "json")[1]) if row["name"] == "digits"]
    told = {"storage": 690_922, "math": 12_630_528, "metric": "top-1", "threshold": 0.97}
    assert {name: digits[name] for name in told} == told
    rows = csv.DictReader(io.StringIO(run("tasks", "--format", "csv")[1]))
    (digits,) = [row for row in rows if row["name"] == "digits"]
    assert (float(digits["storage"]), digits["metric"], digits["threshold"]) == (690_922, "top-1", "0.97")
    assert "| 690,922 | 12,630,528 | top-1 " in run("tasks", "--format", "markdown")[1]


def test_the_options_of_a_strategy(run):
    status, out, _ = run("strategies", "low-rank", "--format", "json")
    rows = {row["option"]: row for row in json.loads(out)}
    assert status == 0
    assert rows["parameters"]["default"] == "required"
    assert rows["macs"]["default"] is None
    assert "whole model" in rows["parameters"]["meaning"]
    assert "parameters" in run("strategies", "low-rank")[1]


def test_the_types_of_options_are_told_as_they_are_written(run):
    rows = {row["option"]: row for row in json.loads(run("strategies", "lsq", "--format", "json")[1])}
    types = {
        "power_of_two": "true, false or activations",
        "layer_bits": "{ name = int, ... }",
        "first_last_bits": "int",
        "granularity": "tensor or channel",
        "keep_batch_norm": "true or false",
    }
    assert {option: rows[option]["type"] for option in types} == types
    assert rows["keep_batch_norm"]["default"] is False
    table = run("strategies", "lsq", "--format", "markdown")[1]
    assert "| true or false | false |" in table
    assert "| int | none |" in table
    rows = {row["option"]: row for row in json.loads(run("strategies", "eigendamage", "--format", "json")[1])}
    assert rows["fisher"]["type"] == '"true" or empirical'  # without quotes it is no text
    assert json.loads(run("strategies", "fpgm", "--format", "json")[1])[-1]["type"] == "[str, ...]"


@pytest.mark.parametrize("style", ["table", "json", "csv", "markdown"])
def test_a_strategy_without_options(run, register, style):
    class Plain(Quantizer):
        """Does nothing."""

        def apply(self, model, context):
            return model

    register(quantizers={"plain": Plain})
    status, _, err = run("strategies", "plain", "--format", style)
    assert (status, err) == (0, "")


# --- width and terminal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_figure_of_a_report_is_cut(run, submission, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    claim(submission, "storage = 123_456_789_012\nmath = 345_678_901_234\nscore = 0.0123456")
    out = run(submission, "--layers")[1]
    report = evaluate(submission)
    assert "…" not in out
    assert max(len(line) for line in out.splitlines()) <= width
    figures = [report.storage.bits, report.storage.value_bits, report.storage.mask_bits, report.storage.overhead_bits]
    figures += [report.storage.file_bytes, report.math.mults, report.math.adds, report.math.macs]
    figures += [123_456_789_012, 345_678_901_234, *(layer.storage_bits for layer in report.layers)]
    words = {word.strip("(),:;") for word in out.split()}
    assert {f"{figure:,}" for figure in figures} <= words
    assert {f"{report.score.total:.6g}", f"{report.score.math:.6g}", "0.0123456"} <= words
    assert {"params32", "ops32", "score", "quality", "holds", "fails", "FAILED"} <= words


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_figure_of_several_reports_is_cut(run, submission, tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    other = shutil.copytree(submission, tmp_path / "another-one-with-a-name-that-is-long")
    out = run(submission, other)[1]
    report = evaluate(submission)
    assert "…" not in out
    assert max(len(line) for line in out.splitlines()) <= width
    for figure in (report.score.storage, report.score.math, report.score.total)[-1 if width < 80 else 0 :]:
        assert out.count(f" {figure:.5f} ") == 2
    assert " small " in out and "another-" in out
    assert out.count(f" {report.quality.measured:.2%} ") == 2


@pytest.mark.parametrize("width", [40, 60, 200])
@pytest.mark.parametrize("option", [("--depth", "1"), ("--cross-check",)])
def test_no_figure_of_a_model_is_cut(run, monkeypatch, width, option):
    monkeypatch.setenv("COLUMNS", str(width))
    out = run("count", "torchvision:resnet18", "--input", "1x3x64x64", *option)[1]
    assert "…" not in out
    assert max(len(line) for line in out.splitlines()) <= width
    assert ("187 M" if option[0] == "--depth" else "agree") in out  # of the last column


@pytest.mark.parametrize("width", [60, 200])
def test_no_figure_of_the_tasks_is_cut(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    out = run("tasks")[1]
    assert "…" not in out
    assert {"36,500,000", "10,490,000,000", "690,922", "12,630,528"} <= set(out.split())


@pytest.mark.parametrize("words", [["strategies"], ["strategies", "low-rank"], ["architectures"]])
@pytest.mark.parametrize("width", [60, 200])
def test_no_word_of_a_list_is_lost(run, monkeypatch, width, words):
    monkeypatch.setenv("COLUMNS", str(width))
    out = run(*words)[1]
    assert "…" not in out
    assert max(len(line) for line in out.splitlines()) <= width


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("words", [["tasks"], ["strategies"], ["strategies", "fixed-point"], ["validate", "nowhere"]])
def test_a_list_breaks_no_word_of_people(run, monkeypatch, width, words):
    """Each word is there whole: in a table, or, where one would be too narrow, in fields below each other."""
    monkeypatch.setenv("COLUMNS", str(width))
    out = run(*words)[1]
    rows = json.loads(run(*words, "--format", "json")[1])
    told = [str(row[name]) for row in rows for name in ("name", "kind", "does", "option", "meaning", "mend", "baseline")
            if name in row]  # fmt: skip
    assert {word for text in told for word in text.split()} <= set(out.split())
    assert max(map(len, out.splitlines())) <= width
    assert ("┃" in out) == (width >= {"strategies": 60, "tasks": 120, "fixed-point": 120, "nowhere": 80}[words[-1]])
    if "┃" not in out and words == ["tasks"]:
        assert re.search(r"^storage +690,922 *\nmath +12,630,528 *\nquality +top-1 >= 97.00% *\n", out, re.MULTILINE)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("style", ["table", "csv"])
def test_letters_that_the_output_cannot_show_are_escaped(run, monkeypatch, tmp_path, encoding, style):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    status, _, err = run("validate", "\u017e", "--format", style)
    assert (status, err) == (2, "")
    shown = sys.stdout.buffer.getvalue().decode()
    assert "\u017e" in shown or "\\u017e" in shown


def on_a_terminal(*words):
    """What the command writes to a terminal that is its standard input, output and error."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, *words], stdin=its, stdout=its, stderr=its, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(its)
    text = b""
    try:
        while piece := os.read(ours, 65536):
            text += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    process.wait()
    return text.decode()


def test_a_progress_bar_on_a_terminal_only(run, submission):
    on, (_, out, err) = on_a_terminal(submission), run(submission)
    assert "measuring small" in on
    assert "100%" in on
    assert "not zero" in on
    assert "measuring" not in out + err
    assert "\x1b" not in out + err


def test_the_help_tells_the_limits_that_are_in_force(run):
    told = re.search(r"by default (memory=.+); (evaluation=\d+) ", " ".join(run("validate", "--help")[1].split()))
    assert Limits.parse(",".join(told.groups())) == Limits()
