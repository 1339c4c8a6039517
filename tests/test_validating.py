"""`validate`: every mistake by its rule, with the place and the mend; `reproduce`: the recipe run again."""

import json
import shutil
import time

import pytest
import tomli_w
from conftest import MODEL

from micronet_eval import opening, packing
from micronet_eval.quality import not_measured
from micronet_eval.submission import WEIGHTS
from micronet_eval.validating import RULES, validate


@pytest.fixture
def good(submission, monkeypatch):
    """A submission without a fault: its threshold is one that untrained weights reach."""
    import dataclasses

    real = opening.task_of
    monkeypatch.setattr(opening, "task_of", lambda *words: dataclasses.replace(real(*words), threshold=0.01))
    return submission


def told(folder, rule):
    """The findings of one rule as text; there are no errors of another."""
    found = validate(folder)
    assert {finding.rule for finding in found if finding.kind == "error"} <= {rule}
    assert all(finding.rule in RULES and finding.mend and finding.place for finding in found)
    return [f"{f.kind} {f.place}: {f.told}; {f.mend}" for f in found if f.rule == rule]


def test_nothing_is_wrong_with_a_good_submission(good, run):
    assert validate(good) == []
    assert run("validate", good) == (0, "valid\n", "")
    assert json.loads(run("validate", good, "--format", "json")[1]) == []
    assert run("validate", good, "--format", "csv")[1] == "kind,rule,place,told,mend\n"


def edit(folder, before, after, name="submission.toml"):
    text = (folder / name).read_text()
    assert before in text
    (folder / name).write_text(text.replace(before, after))


def test_every_wrong_field_is_a_finding(good, run):
    edit(good, 'task = "digits"\n', "colour = 1\n")
    found = told(good, "manifest.field")
    assert len(found) == 2
    assert any("submission.toml: field 'task': Field required (add this field)" in text for text in found)
    assert any("submission.toml: field 'colour': Extra inputs" in text for text in found)
    status, out, _ = run("validate", good, "--format", "csv")
    assert status == 2
    assert out.splitlines()[0] == "kind,rule,place,told,mend"


def replaced(path):
    """The path of a file that was removed."""
    path.unlink()
    return path


def moved(path):
    """Leaves a link to a file in its place."""
    path.symlink_to(path.rename(path.parent.with_name(path.name)))


@pytest.mark.parametrize(
    ("rule", "change", "message"),
    [
        ("folder.exists", lambda f: f.rename(f.with_name("elsewhere")), "it is no folder"),
        ("folder.files", lambda f: (f / "link").symlink_to("/etc/passwd"), "link: it is a link"),
        ("folder.files", lambda f: [(f / f"x{i}").touch() for i in range(200)], "it holds 203 files; at most 100"),
        (
            "folder.files",
            lambda f: (f / "link").symlink_to("x"),
            "it is a link; remove what is no part of the submission",
        ),
        ("folder.files", lambda f: replaced(f / WEIGHTS).mkdir(), f"{WEIGHTS}: it is no ordinary file; put the file"),
        (
            "folder.files",
            lambda f: replaced(f / "submission.toml").mkdir(),
            "it is no ordinary file; put the file itself",
        ),
        ("folder.files", lambda f: moved(f / WEIGHTS), f"{WEIGHTS}: it is a link; put the file itself there"),
        ("folder.files", lambda f: moved(f / "recipe.toml"), "recipe.toml: it is a link; put the file itself there"),
        ("folder.files", lambda f: replaced(f / WEIGHTS).symlink_to("x"), f"{WEIGHTS}: it is a link; put the file"),
        ("manifest.toml", lambda f: (f / "submission.toml").write_text("a ="), "no valid TOML"),
        ("manifest.toml", lambda f: (f / "submission.toml").unlink(), "is missing; write it as docs/format.md shows"),
        ("manifest.task", lambda f: edit(f, '"digits"', '"digit"'), "unknown task 'digit'"),
        ("weights.file", lambda f: (f / WEIGHTS).write_bytes(b""), "truncated or damaged"),
        ("weights.file", lambda f: (f / WEIGHTS).unlink(), "is missing"),
        ("model.fits", lambda f: edit(f, "width = 1", "width = 2"), "the weights do not fit"),
        (
            "manifest.field",
            lambda f: edit(f, "[provenance]", "[claims]\nquality = 99.5\n[provenance]"),
            "submission.toml: field 'claims.quality': Input should be less than or equal to 1, a share; correct the",
        ),
        (
            "manifest.field",
            lambda f: edit(f, "[provenance]", "[paths]\nexit = 0.3\n[provenance]"),
            "submission.toml: field 'paths': shares are given of exit, but the model has only one path; correct the",
        ),
        ("manifest.field", lambda f: edit(f, "depth = 10", "depth = 11"), "field 'architecture': depth 11"),
        ("score.claims", lambda f: edit(f, "[provenance]", "[claims]\nstorage = 1\n[provenance]"), "claims.storage: "),
    ],
)
def test_a_finding_of_each_rule(good, rule, change, message):
    change(good)
    errors = [text for text in told(good, rule) if text.startswith("error")]
    assert len(errors) == 1
    assert message in errors[0]


def test_what_is_wrong_with_the_files_does_not_hide_what_is_wrong_inside(good):
    (good / "link").symlink_to("nowhere")
    edit(good, '"digits"', '"digit"')
    (good / WEIGHTS).write_bytes(b"")
    assert {f.rule for f in validate(good)} == {"folder.files", "manifest.task", "weights.file"}


def test_warnings_do_not_make_a_submission_invalid(good, run):
    (good / "notes.txt").touch()
    (good / ".kept").mkdir()
    edit(good, 'name = "small"', 'name = "sm\u0430ll"')  # Cyrillic
    edit(good, 'sparsifier = "magnitude"', 'sparsifier = "magnitud"', "recipe.toml")
    found = validate(good)
    assert {(f.kind, f.rule) for f in found} == {
        ("warning", rule) for rule in ("folder.files", "folder.finished", "manifest.letters")
    }
    assert r"'sm\u0430ll' mixes cyrillic and latin letters" in " ".join(f.told for f in found)
    assert run("validate", good)[0] == 0


def test_a_threshold_is_told_in_whole_examples(submission):
    (text,) = told(submission, "score.threshold")  # 0.97 of 449 is 435.53
    assert "at least 436 of 449 are asked" in text


def test_code_that_fails(own, tmp_path):
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "state.pt").unlink()
    (folder / "model.py").write_text(MODEL + "\n1 / 0\n")
    (text,) = told(folder, "code.runs")
    assert text.startswith(f"error {folder / 'model.py'}: ZeroDivisionError")


def test_code_that_is_missing(own, tmp_path):
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "state.pt").unlink()
    (folder / "model.py").unlink()
    place = folder / "model.py"
    assert told(folder, "code.runs") == [f"error {place}: is missing; put it beside submission.toml, which names it"]


def test_a_folder_of_submissions_is_none(good):
    (good.parent / "notes").mkdir()
    place = good.parent
    assert told(place, "folder.exists") == [
        f"error {place}: it holds submissions, and is none; name one of them: small"
    ]


def test_weights_that_change_while_they_are_measured(good, monkeypatch):
    def measure(model, task, *words, apart):
        next(model.parameters()).data.add_(1)
        return not_measured(task, None, "")

    monkeypatch.setattr("micronet_eval.evaluation.measure", measure)
    (text,) = told(good, "model.measures")
    assert "while it runs; what is counted has to be what is measured" in text


# --- reproduce --------------------------------------------------------------------------------------------------------


def test_a_recipe_that_makes_its_submission_again(submission, run):
    status, out, err = run("reproduce", submission)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "the weights are the same, bit for bit"


def test_a_recipe_that_makes_another_submission(submission, run):
    edit(submission, "sparsity = 0.5", "sparsity = 0.4", "recipe.toml")
    edit(submission, 'name = "small"', 'name = "smaller"')
    status, out, _ = run("reproduce", submission)
    assert status == 1
    assert "submission.toml: field 'name' is another" in out
    assert " values differ, by " in out
    assert out.splitlines()[-1] == "the weights differ"


def test_a_recipe_that_makes_another_architecture(submission, run):
    edit(submission, "depth = 10", "depth = 16", "recipe.toml")
    status, out, err = run("reproduce", submission)
    assert (status, err) == (1, "")
    assert "submission.toml: field 'architecture' is another" in out
    assert ": only one of the two has it" in out
    assert out.splitlines()[-1] == "the weights differ"


def test_one_bit_is_found(submission, run):
    packed = packing.read(submission / WEIGHTS)
    values = packed.streams["values"].copy()
    values[0] ^= 2  # of the first code, which is no zero
    packing.write(packing.Packed(packed.structure, {**packed.streams, "values": values}, {}), submission / WEIGHTS)
    status, out, _ = run("reproduce", submission)
    assert status == 1
    assert out.count("values differ") == 1
    assert ": 1 of " in out


def test_a_submission_without_a_recipe(submission, run):
    (submission / "recipe.toml").unlink()
    status, _, err = run("reproduce", submission)
    assert (status, err.count("\n")) == (2, 1)
    assert "only a submission with its recipe can be reproduced" in err


def test_a_recipe_that_is_wrong(submission, run):
    (submission / "recipe.toml").write_text(tomli_w.dumps({"task": "digits"}))
    status, _, err = run("reproduce", submission)
    assert status == 2
    assert f"{submission / 'recipe.toml'}: field 'architecture'" in err


def test_a_validation_ends_in_time(good, run, monkeypatch):
    monkeypatch.setattr("micronet_eval.evaluation.measure", lambda *words, apart: time.sleep(30))
    status, out, err = run("validate", good, "--limits", "evaluation=3", "--format", "csv")
    assert (status, err) == (2, "")
    assert "it took more than 3 seconds (--limits evaluation)" in out
