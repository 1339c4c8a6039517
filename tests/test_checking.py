"""`micronet-eval check`: limits, claims and threshold, as JUnit XML and as Markdown."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from micronet_eval import evaluate
from micronet_eval.checking import check_limits, checks, to_junit, to_summary
from micronet_eval.plugins import lookup
from micronet_eval.task import DataMissing


@pytest.fixture
def report(submission):
    return evaluate(submission)  # untrained: its quality is far below the threshold


def test_limits_hold_or_fail_by_the_measurement(report):
    total, quality = report.score.total, report.quality.measured
    found = {check.name: check.holds for check in checks(report, total, quality)}
    assert (found["score"], found["quality"], found["threshold of digits"]) == (True, True, False)
    found = {check.name: check.holds for check in checks(report, total * 0.999, quality + 0.01)}
    assert (found["score"], found["quality"]) == (False, False)
    assert [check.name for check in checks(report)] == ["threshold of digits"]


def test_what_was_asked_for_and_cannot_be_measured_fails(report):
    unknown = report.model_copy(
        update={"score": None, "quality": report.quality.model_copy(update={"measured": None, "passed": None})}
    )
    found = {check.name: check.holds for check in checks(unknown, 1.0, 0.5)}
    assert found == {"score": False, "quality": False, "threshold of digits": None}


def test_lower_is_better_for_a_perplexity(report):
    quality = report.quality.model_copy(update={"metric": "perplexity", "measured": 30.0})
    perplexity = report.model_copy(update={"quality": quality})
    assert next(check.holds for check in checks(perplexity, min_quality=35)) is True
    assert next(check.holds for check in checks(perplexity, min_quality=29)) is False


@pytest.mark.parametrize(
    ("option", "limit", "told"),
    [
        ("--max-score", "-1", "--max-score -1 is below every score"),
        ("--min-quality", "99", "--min-quality 99 is no share; write for example 0.94"),
        ("--min-quality", "nan", "--min-quality nan is no limit"),
        ("--max-score", "inf", "--max-score inf is no limit"),
    ],
)
def test_what_is_no_limit_is_told_before_anything_is_measured(
    run, submission, tmp_path, monkeypatch, option, limit, told
):
    monkeypatch.setattr("micronet_eval.evaluation.evaluate", lambda *_, **__: pytest.fail("it was measured"))
    junit, summary = tmp_path / "j.xml", tmp_path / "s.md"
    code, out, err = run("check", submission, option, limit, "--junit", junit, "--summary", summary)
    assert (code, out) == (2, "")
    assert told in err and told in junit.read_text() and "not evaluated" in summary.read_text()


def test_an_unknown_ruleset_is_told_in_the_files_too(run, submission, tmp_path):
    junit, summary = tmp_path / "j.xml", tmp_path / "s.md"
    code, out, err = run("check", submission, "--ruleset", "nope", "--junit", junit, "--summary", summary)
    assert (code, out) == (2, "")
    assert "unknown ruleset" in err and "unknown ruleset" in junit.read_text() and summary.exists()


def test_a_perplexity_has_limits_above_1(submission):
    manifest = submission / "submission.toml"
    manifest.write_text(manifest.read_text().replace('task = "digits"', 'task = "wikitext103"'))
    check_limits(submission, min_quality=35)


def test_junit_and_summary(report):
    hostile = report.model_copy(update={"submission": "a|b <script>&\"'"})
    found = checks(hostile, 0.0, 0.0)
    suite = ElementTree.fromstring(to_junit(hostile, found))
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    assert [case.get("name") for case in suite] == ["score", "quality", "threshold of digits"]
    assert suite[0][0].tag == "failure"
    assert suite[0].get("classname") == "a|b <script>&\"'"
    text = to_summary(hostile, found)
    assert "<script>" not in text
    assert "a\\|b" in text
    assert "| score | **fails** |" in text


def test_the_file_that_cannot_be_written_is_named(run, submission, tmp_path):
    code, _, err = run("check", submission, "--junit", tmp_path / "j.xml", "--summary", tmp_path)
    assert code == 2
    assert f"{tmp_path} cannot be written" in err
    assert (tmp_path / "j.xml").exists()


def test_the_command(run, submission, tmp_path):
    words = ["check", submission, "--max-score", "100", "--junit", tmp_path / "j.xml", "--summary", tmp_path / "s.md"]
    code, out, _ = run(*words)
    assert code == 1  # the threshold fails
    assert "threshold of digits" in out
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("failures") == "1"
    run(*words)
    assert (tmp_path / "s.md").read_text().count("### small") == 2


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_terminal_gets_a_table_and_the_reason_and_the_file_markdown(
    run, submission, tmp_path, monkeypatch, register, width
):
    monkeypatch.setenv("COLUMNS", str(width))

    def nowhere(root, split):
        raise DataMissing("nobody has it")

    register(tasks={"absent": replace(lookup("task", "digits"), name="absent", dataset=nowhere)})
    manifest = submission / "submission.toml"
    manifest.write_text(manifest.read_text().replace('task = "digits"', 'task = "absent"'))
    code, out, _ = run("check", submission, "--min-quality", "0.8", "--summary", tmp_path / "s.md")
    assert code == 1
    assert "|" not in out and "\\" not in out and "*" not in out and "…" not in out
    assert max(map(len, out.splitlines())) <= width
    assert "quality fails not measured >= 80.00%" in " ".join(out.split())
    assert {"threshold", "measured", "quality", "fails"} <= set(out.split())
    assert "Quality: not measured: nobody has it" in out
    text = (tmp_path / "s.md").read_text()
    assert "| quality | **fails** | not measured \\>= 80.00% |" in text
    assert "\nquality not measured: nobody has it\n" in text


def test_the_summary_is_appended_to_the_file_that_is_there(run, submission, tmp_path):
    summary = tmp_path / "s.md"
    summary.write_text("before\n")
    summary.chmod(0o600)
    (tmp_path / "link.md").symlink_to(summary)
    (submission / "weights.safetensors").unlink()
    run("check", submission, "--summary", tmp_path / "link.md")
    assert summary.read_text().startswith("before\n### small: not evaluated\n")
    assert (tmp_path / "link.md").is_symlink() and summary.stat().st_mode & 0o777 == 0o600
    run("check", submission, "--summary", tmp_path / "new" / "s.md")
    assert (tmp_path / "new" / "s.md").exists()


def test_what_cannot_be_evaluated_is_told_in_the_files_too(run, submission, tmp_path):
    (submission / "weights.safetensors").write_bytes(b"nothing <&|")
    junit, summary = tmp_path / "j.xml", tmp_path / "s.md"
    code, out, err = run("check", submission, "--junit", junit, "--summary", summary)
    assert (code, out) == (2, "")
    (case,) = ElementTree.parse(junit).getroot()
    assert (case.get("name"), case[0].tag) == ("evaluation", "error")
    assert case[0].get("message") == err.removeprefix("micronet-eval: ").strip()
    assert summary.read_text().startswith(f"### {submission.name}: not evaluated\n\n")
