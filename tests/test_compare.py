"""Strategies side by side: the grid, the same numbers as a submission's, results that last, the table."""

import gc
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import Field
from rich.console import Console

from micronet_eval import comparing, evaluate, plugins
from micronet_eval.comparing import (
    Job,
    Result,
    Row,
    grid,
    jobs_at,
    jobs_in,
    jobs_of,
    options,
    parse,
    results_of,
    rows,
    run,
    sorted_rows,
)
from micronet_eval.comparing.showing import LiveView
from micronet_eval.errors import InputError
from micronet_eval.recipe import compress
from micronet_eval.strategy import Sparsifier

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = Path(__file__).parent.parent / "docs"
BASE = """
task = "digits"
seed = 5
[submission]
name = "base"
authors = ["test"]
[architecture]
name = "wide-resnet"
depth = 10
width = 1
classes = 10
channels = 1
[[stages]]
train = { epochs = 1, learning_rate = 0.01 }
"""


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base.toml").write_text(BASE)
    return tmp_path / "base.toml"


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_every_combination_of_the_values_is_a_cell():
    cells = parse("quantizer", "fixed-point:weight_bits=4,8,calibration=max")
    assert cells == [
        (("quantizer", "fixed-point", {"weight_bits": 4, "calibration": "max"}),),
        (("quantizer", "fixed-point", {"weight_bits": 8, "calibration": "max"}),),
    ]
    sparse = parse("sparsifier", "magnitude:sparsity=0.5") + parse("sparsifier", "random")
    assert [comparing.title(cell) for cell in grid([[], sparse, cells])] == [
        "magnitude:sparsity=0.5 + fixed-point:weight_bits=4,calibration=max",
        "magnitude:sparsity=0.5 + fixed-point:weight_bits=8,calibration=max",
        "random + fixed-point:weight_bits=4,calibration=max",
        "random + fixed-point:weight_bits=8,calibration=max",
    ]
    assert grid([[], []]) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('lsq:layer_bits={"conv_1":2}', [{"layer_bits": {"conv_1": 2}}]),
        ('lsq:layer_bits={"a1_2.*":2,"b,=":4},batches=3', [{"layer_bits": {"a1_2.*": 2, "b,=": 4}, "batches": 3}]),
        ('lsq:layer_bits={"a":2},{"b=":3}', [{"layer_bits": {"a": 2}}, {"layer_bits": {"b=": 3}}]),
        ("lsq:batches=1_0,2", [{"batches": 10}, {"batches": 2}]),
    ],
)  # fmt: skip
def test_a_value_is_a_table_or_a_number_as_a_recipe_has_it(text, found):
    assert [options for ((_, _, options),) in parse("quantizer", text)] == found


@pytest.mark.parametrize(
    "text",
    [
        'lsq:layer_bits={"1.0.conv1":2,"é":4}',
        "lsq:keep_batch_norm=true,granularity=channel",
        "fixed-point:weight_bits=4,calibration=max",
    ],
)
def test_a_cell_is_called_as_it_is_given(text):
    (cell,) = parse("quantizer", text)
    assert comparing.title(cell) == text


@pytest.mark.parametrize("value", ["a,b", "true", "4", '"', "[", "a b=c", ["a,b", 1.5]])
def test_a_text_that_would_be_read_as_something_else_is_quoted(value):
    text = comparing.title((("quantizer", "x", {"option": value}),)).removeprefix("x:")
    assert options(text) == {"option": value}


def test_a_value_is_a_list_or_a_text():
    assert options('keep=["a_1","b"],name=res_20,scheme="x,y"') == {
        "keep": ["a_1", "b"], "name": "res_20", "scheme": "x,y"
    }  # fmt: skip


def test_an_option_of_several_types_is_told_by_what_it_may_be():
    for text, message in (
        ("power_of_two=foo", "option 'power_of_two': Input should be true, false or activations"),
        ('layer_bits={"conv":1}', "option 'layer_bits.conv': Input should be greater than or equal to 2"),
        ("first_last_bits=9", "option 'first_last_bits': Input should be less than or equal to 8"),
    ):
        with pytest.raises(InputError, match=rf"lsq: {re.escape(message)}$"):
            parse("quantizer", f"lsq:{text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magnitud", "nearest: magnitude"),
        ("magnitude:sparsit=0.5", "unknown option 'sparsit'; nearest: sparsity"),
        ("magnitude:0.5", "'0.5' has no value; write options like option=value"),
        ("magnitude:sparsity=0.5,7", "--sparsifier magnitude:.*: option 'sparsity': Input should be less than"),
    ],
)
def test_what_is_no_strategy(text, message):
    with pytest.raises(InputError, match=message):
        parse("sparsifier", text)


@pytest.mark.parametrize("value", ["null", "NaN", "Infinity", "9" * 5_000, "[" * 100_000], ids=lambda value: value[:9])
def test_a_value_that_no_recipe_can_have_is_refused(base, value):
    """With a message, before anything is trained; some are JSON, others were tracebacks."""
    for option in ("back_ratio", "damping", "batches"):
        with pytest.raises(InputError, match="pruner eigendamage: option"):
            parse("pruner", f"eigendamage:{option}={value}")
    cells, given = parse("sparsifier", "random"), options(f"epochs=1,learning_rate={value}")
    with pytest.raises(InputError, match="--fine-tune: field 'learning_rate'"):
        jobs_of(cells, base, 1, given, None, base.parent / "kept")


def test_fine_tuning_options():
    assert options("epochs=2,learning-rate=0.001,optimizer=sgd") == {
        "epochs": 2, "learning_rate": 0.001, "optimizer": "sgd"
    }  # fmt: skip
    with pytest.raises(InputError, match="'epochs' has no value"):
        options("epochs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pruner", "magnitude:ratio=7"], "--pruner magnitude:ratio=7: pruner magnitude: option 'ratio'"),
        (["--fine-tune", "epochs=-1,learning_rate=0.1"], "--fine-tune: field 'epochs': Input should be greater than 0"),
        (["--fine-tune", "epoch=1,epochs=1,learning_rate=0.1"], "--fine-tune: field 'epoch': Extra inputs"),
    ],
)
def test_options_out_of_range_are_told_before_anything_is_trained(base, run, tmp_path, words, message):
    kept = tmp_path / "results.sqlite"
    status, out, err = run("compare", "--on", base, "--pruner", "random", *words, "--results", kept)
    assert (status, out) == (2, "")
    assert message in err
    assert list(tmp_path.glob("results*")) == []


@pytest.mark.parametrize("words", [["--pruner", "random"], ["--sparsifier", "random"], ["--quantizer", "affine"]])
def test_a_base_that_quantizes_is_refused_before_anything_is_trained(run, tmp_path, words):
    (tmp_path / "base.toml").write_text(BASE + '[[stages]]\nquantizer = "fixed-point"\n')
    status, out, err = run("compare", "--on", tmp_path / "base.toml", *words, "--results", tmp_path / "r.sqlite")
    assert (status, out) == (2, "")
    assert err == (
        f"micronet-eval: --on {tmp_path / 'base.toml'} quantizes already (stages.1); give a recipe that only trains\n"
    )
    assert not (tmp_path / "r.kept").exists()


@pytest.mark.parametrize("name", ["accumulators", "biases"])
def test_what_goes_behind_a_quantizer_is_compared_on_what_it_quantized(tmp_path, name):
    (tmp_path / "base.toml").write_text(BASE + '[[stages]]\nquantizer = "fixed-point"\n')
    (job,) = jobs_of(parse("quantizer", name), tmp_path / "base.toml", 1, None, None, tmp_path)
    assert [stage["quantizer"] for stage in tomllib.loads(job.recipe)["stages"] if "quantizer" in stage][1] == name


@pytest.mark.parametrize("page", ["compare.md", "index.md"])
def test_the_command_of_the_documentation_fits_its_recipe(tmp_path, page):
    text = (DOCS / page).read_text()
    (recipe,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    (tmp_path / "trained.toml").write_text(recipe)
    (command,) = re.findall(r"compare --on trained.toml([^`]*)", text)
    pruned = [cell for given in re.findall(r"--pruner (\S+)", command) for cell in parse("pruner", given)]
    (quantizer,) = re.findall(r"--quantizer (\S+)", command)
    cells = grid([pruned, parse("quantizer", quantizer)])
    assert len(jobs_of(cells, tmp_path / "trained.toml", 1, None, None, tmp_path)) == 2 * len(pruned)


def test_a_base_that_is_no_recipe_is_told_by_its_name(run, tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('task = "digits"\n')
    status, _, err = run("compare", "--on", wrong, "--pruner", "random", "--results", tmp_path / "r.sqlite")
    assert status == 2
    assert f"{wrong}: field 'stages': Field required" in err


# --- running ----------------------------------------------------------------------------------------------------------


def test_a_cell_scores_what_the_same_recipe_scores(base, tmp_path):
    (job,) = jobs_of(
        parse("sparsifier", "magnitude:sparsity=0.5"),
        base,
        1,
        {"epochs": 1, "learning_rate": 0.001},
        None,
        tmp_path / "kept",
    )
    result = run(job)
    assert result.error == ""
    (tmp_path / "recipe.toml").write_text(job.recipe)
    compress(tmp_path / "recipe.toml", tmp_path / "alone")
    report = evaluate(tmp_path / "alone")
    assert (result.score, result.quality) == (report.score.total, report.quality.measured)
    assert (result.params32, result.ops32) == (report.storage.params32, report.math.ops32)


def test_the_base_is_trained_once_for_each_seed(base, tmp_path, monkeypatch):
    from micronet_eval import recipe

    trainings = []
    real = recipe.train

    def counted(model, training, *rest):
        trainings.append(training.epochs)
        return real(model, training, *rest)

    monkeypatch.setattr(recipe, "train", counted)
    jobs = jobs_of(parse("sparsifier", "magnitude:sparsity=0.5,0.9"), base, 2, None, None, tmp_path / "kept")
    assert [(job.name, job.seed) for job in jobs] == [
        ("magnitude:sparsity=0.5", 0), ("magnitude:sparsity=0.5", 1),
        ("magnitude:sparsity=0.9", 0), ("magnitude:sparsity=0.9", 1),
    ]  # fmt: skip
    found = results_of(jobs, tmp_path / "results.sqlite", "here")
    assert len(trainings) == 2
    assert all(not result.error for result in found)
    assert found[0].score > found[2].score
    assert found[0].quality != found[1].quality or found[0].score != found[1].score


def test_the_time_of_a_cell_is_its_own(base, tmp_path, monkeypatch):
    """The base belongs to all, whoever trains it or waits for it."""
    clock, real = [0.0], comparing.jobs._lay

    def laid(*words):
        real(*words)
        clock[0] += 1000

    monkeypatch.setattr(comparing.jobs, "_lay", laid)
    monkeypatch.setattr(comparing.jobs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    (job,) = jobs_of(parse("sparsifier", "random"), base, 1, None, None, tmp_path / "kept")
    result = run(job)
    assert (result.error, result.seconds, clock) == ("", 0, [1000])


def test_what_a_killed_run_left_of_a_base_goes(base, tmp_path):
    (job,) = jobs_of(parse("sparsifier", "random"), base, 1, None, None, tmp_path / "kept")
    left = tmp_path / "kept" / f"{comparing.jobs._depends(job.base, None)}-abc"
    (left / ".kept").mkdir(parents=True)
    assert not run(job).error
    assert not left.exists() and len([*left.parent.iterdir()]) == 2  # the base, and its lock


def test_results_last_and_failures_are_tried_again(base, tmp_path, register):
    class Moody(Sparsifier):
        """Fails the first time."""

        sparsity: float = Field(0.5, description="nothing")

        def apply(self, model, context):
            calls.append(self.sparsity)
            if len(calls) == 1:
                raise ZeroDivisionError("moody")
            from micronet_plugins.magnitude import Magnitude

            return Magnitude(sparsity=self.sparsity).apply(model, context)

    calls = []
    register(sparsifiers={"moody": Moody})
    jobs = jobs_of(parse("sparsifier", "moody:sparsity=0.5,0.6"), base, 1, None, None, tmp_path / "kept")
    first = results_of(jobs, tmp_path / "results.sqlite", "here")
    assert [result.error for result in first] == ["ZeroDivisionError: moody", ""]
    seen = []
    second = results_of(
        jobs, tmp_path / "results.sqlite", "here", watch=lambda found, running: seen.append((len(found), running))
    )
    assert calls == [0.5, 0.6, 0.5]
    assert second[1] == first[1]
    assert not second[0].error
    assert seen == [(1, 1), (2, 0)]
    with closing(sqlite3.connect(tmp_path / "results.sqlite")) as store:
        assert store.execute("SELECT count(*) FROM results").fetchone() == (2,)


def test_a_quantizer_that_keeps_batch_norm_finds_it(base, tmp_path):
    words = "lsq:weight_bits=4,granularity=channel,keep_batch_norm=false,true"
    jobs = jobs_of(parse("quantizer", words), base, 1, {"epochs": 1, "learning_rate": 0.01}, None, tmp_path / "kept")
    assert ['merge = "batch-norm"' in job.recipe for job in jobs] == [True, False]
    merged, kept = results_of(jobs, tmp_path / "results.sqlite", "here")
    assert not merged.error
    assert not kept.error
    assert kept.quality is not None


def shout(job):
    os.write(2, b"loud")
    print("loud", flush=True)
    return Result(job.name, job.seed)


def test_processes_print_nothing_into_the_live_view(capfd):
    from micronet_plugins.executors import local

    assert [result.name for _, result in local(shout, [Job("a")], 1)] == ["a"]
    assert capfd.readouterr() == ("", "")


def garbage(job):
    return Result(job.name, job.seed, error=str(gc.get_threshold()))


def test_processes_search_for_garbage_as_seldom_as_the_command():
    from micronet_plugins.executors import local

    assert [result.error for _, result in local(garbage, [Job("a")], 1)] == ["(100000, 50, 50)"]


def test_what_a_process_does_first_imports_no_torch():
    """So that it is imported with few searches for garbage."""
    code = "import sys; from micronet_plugins.worker import prepare; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


class Slow:
    """Takes its time when it is taken apart."""

    def __del__(self):
        time.sleep(30)


def keeps(job):
    keeps.slow = Slow()
    return Result(job.name, job.seed, score=1.0)


def test_processes_take_nothing_apart_at_their_end():
    from micronet_plugins.executors import local

    start = time.monotonic()
    assert [result.score for _, result in local(keeps, [Job("a")], 1)] == [1.0]
    assert time.monotonic() - start < 25


def dies(job):
    if job.name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return Result(job.name, job.seed, score=1.0)


def test_a_process_that_dies_fails_its_job_alone():
    from micronet_plugins.executors import local

    found = {job.name: result.error for job, result in local(dies, [Job(name) for name in "abcde"], 2)}
    assert found == {**dict.fromkeys("acde", ""), "b": "the process that ran it died, out of memory perhaps"}


def test_processes_give_the_same_numbers(base, tmp_path):
    jobs = jobs_of(parse("sparsifier", "random:sparsity=0.3,0.6"), base, 1, None, None, tmp_path / "kept")
    here = results_of(jobs, tmp_path / "here.sqlite", "here")
    local = results_of(jobs, tmp_path / "local.sqlite", "local", workers=2)
    assert [(r.score, r.quality, r.error) for r in here] == [(r.score, r.quality, r.error) for r in local]


def test_a_run_that_is_killed_goes_on_and_leaves_no_process(base, tmp_path):
    words = ["--sparsifier", "random:sparsity=0.2,0.4,0.6,0.8", "--seeds", "1", "--jobs", "2", "--format", "json"]
    command = [sys.executable, "-c", "from micronet_eval.cli import main; main()", "compare", "--on", str(base), *words]
    command += ["--results", str(tmp_path / "killed.sqlite")]

    def stored():
        if not (tmp_path / "killed.sqlite").exists():
            return {}
        with closing(sqlite3.connect(tmp_path / "killed.sqlite")) as store:
            there = store.execute("SELECT 1 FROM sqlite_master").fetchone()
            return dict(store.execute("SELECT * FROM results")) if there else {}

    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as run:
        while not stored() and run.poll() is None:
            time.sleep(0.02)
        run.kill()
        run.stdout.read()  # ends when the last process has that it started
    before = stored()
    assert run.returncode == -signal.SIGKILL
    jobs = jobs_of(parse("sparsifier", words[1]), base, 1, None, None, tmp_path / "kept")
    alone = results_of(jobs, tmp_path / "alone.sqlite", "here")
    again = results_of(jobs, tmp_path / "killed.sqlite", "here")
    assert [replace(r, seconds=0) for r in again] == [replace(r, seconds=0) for r in alone]
    assert 1 <= len(before) < 4 == len(stored())
    assert before.items() <= stored().items()  # nothing was done twice


@pytest.mark.parametrize(("executor", "kept"), [("here", "*/made/.kept/*.pt"), ("local", "*/*/made/.kept/*.pt")])
def test_a_run_that_is_ended_waits_for_no_job(base, tmp_path, executor, kept):
    long = base.with_name("long.toml")
    long.write_text(BASE.replace("epochs = 1", "epochs = 9999"))
    command = [sys.executable, "-c", "from micronet_eval.cli import main; main()", "compare", str(long)]
    command += ["--executor", executor, "--jobs", "1", "--results", str(tmp_path / "ended.sqlite")]
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as run:
        while not any((tmp_path / "temporary").glob(kept)) and run.poll() is None:
            time.sleep(0.02)
        run.terminate()
        try:
            out, _ = run.communicate(timeout=20)  # also ends no sooner than the last process that it started
        finally:
            run.kill()
    assert (run.returncode, out) == (143, b"")
    assert not any((tmp_path / "temporary").glob("tmp*"))  # torch has a cache there


@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_ray_gives_the_same_numbers(base, tmp_path):
    pytest.importorskip("ray")
    cells = parse("sparsifier", "random:sparsity=0.3,0.6")
    jobs = [*jobs_of(cells, base, 1, None, None, tmp_path / "kept"), Job("broken", recipe='task = "digits"')]
    here = results_of(jobs, tmp_path / "here.sqlite", "here")
    ray = results_of(jobs, tmp_path / "ray.sqlite", "ray", workers=2)
    assert [replace(r, seconds=0) for r in here] == [replace(r, seconds=0) for r in ray]
    assert [r.error.partition(": ")[2].partition(":")[0] for r in ray] == ["", "", "field 'architecture'"]
    with pytest.raises(InputError, match="a job asks for 99 GPUs, and the cluster has"):
        results_of([Job("x")], tmp_path / "none.sqlite", "ray:gpus=99", workers=1)


def test_ray_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'micronet-eval\[ray\]'"):
        results_of([Job("x")], tmp_path / "results.sqlite", "ray")


def test_executors_have_options(register):
    def slow(run, jobs, workers, *, pause: float = 0.0, where: str = ""):
        """Says what it was given."""
        yield from [(pause, where)]

    register(executors={"slow": slow})
    assert [*comparing.executor_of("slow:pause=2,where=ray://head:10001")(run, [], 1)] == [(2, "ray://head:10001")]
    for text, message in [
        ("slow:pauses=2", "executor slow: unknown option 'pauses'; nearest: pause"),
        ("slow:pause=long", "executor slow: option 'pause': Input should be a valid number"),
        ("slow:pause=1,2", "'pause' has several values; give one"),
        ("slow:jobs=2", "unknown option 'jobs'"),
    ]:
        with pytest.raises(InputError, match=message):
            comparing.executor_of(text)


def test_a_recipe_is_run_with_each_seed(base, submission):
    jobs = jobs_at(base, 3, None)
    assert [(job.name, job.seed, f"seed = {5 + job.seed}\n" in job.recipe) for job in jobs] == [
        ("base", seed, True) for seed in range(3)
    ]
    assert len({job.key for job in jobs}) == 3
    assert len(jobs_at(submission, 3, None)) == 1


def test_submissions_and_recipes_are_rows(submission, base, tmp_path):
    results = results_of([*jobs_at(submission, 1, None), *jobs_at(base, 1, None)], tmp_path / "results.sqlite", "here")
    assert [result.name for result in results] == ["small", "base"]
    assert results[0].score == evaluate(submission).score.total
    with pytest.raises(InputError, match="no submission's folder and no recipe"):
        jobs_at(tmp_path / "nothing", 1, None)


def test_a_changed_submission_is_evaluated_again(submission, tmp_path):
    (job,) = jobs_at(submission, 1, None)
    before = job.key
    (submission / "submission.toml").write_text((submission / "submission.toml").read_text() + "\n")
    assert job.key != before
    assert replace(job, data="/data").key != job.key  # then its quality may be measured


@pytest.mark.parametrize(
    "reads",
    [
        'start = "{0}"',
        'stages = [{{train = {{epochs = 1, distill = {{teacher = "{0}"}}}}}}]',
        'stages = [{{train = {{epochs = 1, distill = {{teacher = ["other", "{0}"]}}}}}}]',
        'stages = [{{rounds = {{stages = [{{train = {{augment = "{0}/file"}}}}]}}}}]',
    ],
)
def test_a_recipe_is_run_again_when_what_it_reads_has_changed(tmp_path, reads):
    (tmp_path / "file").write_text("a")
    job = Job("x", recipe=reads.format(tmp_path))
    before = job.key
    assert job.key == before
    (tmp_path / "file").write_text("b")
    assert job.key != before


def test_a_job_is_run_again_with_another_version_of_a_plugin(monkeypatch):
    before = Job("x").key
    monkeypatch.setattr(plugins, "packages", lambda: {None: ("stranger", "2")})
    assert Job("x").key != before


def test_what_has_one_name_is_not_one_row(base, submission, tmp_path):
    (submission / "recipe.toml").write_text(BASE)
    other = tmp_path / "other" / submission.name
    shutil.copytree(submission, other)
    jobs = jobs_in([submission, submission / "recipe.toml", other, base], 2, None)
    assert [job.name for job in jobs] == [
        str(submission), *[str(submission / "recipe.toml")] * 2, str(other), "base", "base"
    ]  # fmt: skip


def test_a_result_goes_by_the_name_of_now(base, tmp_path):
    for folder in (tmp_path / "one", tmp_path / "renamed"):
        folder.mkdir()
        shutil.copy(base, folder / "recipe.toml")
        (row,) = comparing.compare(folder / "recipe.toml", results=tmp_path / "r.sqlite", executor="here").rows
        assert row.name == folder.name


def test_a_path_with_the_name_of_a_cell_is_not_its_row(base, submission, tmp_path):
    named = submission.rename(tmp_path / "fixed-point")
    found = comparing.compare(named, on=base, quantizers="fixed-point", results=tmp_path / "r.sqlite", executor="here")
    assert [(row.name, row.seeds) for row in found.rows] == [(str(named), 1), ("fixed-point", 1)]


def test_what_is_given_twice_is_run_once(submission, tmp_path):
    given = submission, submission
    (row,) = comparing.compare(*given, results=tmp_path / "r.sqlite", executor="here").rows
    assert (row.name, row.seeds) == (submission.name, 1)


@pytest.mark.parametrize("what", ["CREATE TABLE results (other TEXT)", "CREATE VIEW results AS SELECT 1 AS key, 2"])
def test_results_of_another_program_are_left_alone(tmp_path, what):
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as store:
        store.execute(what)
    with pytest.raises(InputError, match=r"other.sqlite cannot hold results: .*; name another file by --results"):
        results_of([Job("x")], tmp_path / "other.sqlite", "here")


# --- the table --------------------------------------------------------------------------------------------------------


def test_means_spread_and_the_pareto_front():
    def result(name, score, quality, seed=0, **more):
        return Result(name, seed, "digits", storage=0.1, math=score - 0.1, score=score, quality=quality, **more)

    several = [result("good", 0.2, 0.9, seconds=3), result("good", 0.4, 1.0, 1, seconds=5), result("small", 0.1, 0.5)]
    several.append(result("worse", 0.35, 0.9))
    found = rows([*several, Result("broken", 0, error="why")])
    assert [(row.name, row.best) for row in found] == [
        ("good", True), ("small", True), ("worse", False), ("broken", False)
    ]  # fmt: skip
    assert (found[0].score, found[0].quality, found[0].seeds) == (pytest.approx(0.3), pytest.approx(0.95), 2)
    assert found[0].seconds == 4
    assert found[0].spread["score"] == pytest.approx(0.02**0.5)
    assert found[3].errors == ("why",)
    assert [row.name for row in sorted_rows(found, "score")] == ["small", "good", "worse", "broken"]
    assert [row.name for row in sorted_rows(found, "quality")] == ["good", "worse", "small", "broken"]
    assert [row.name for row in sorted_rows(found, "given")] == [row.name for row in found]


def test_what_was_not_measured_is_neither_best_nor_passed():
    known = Result("known", 0, "digits", score=0.1, quality=0.9, passed=True)
    unknown = Result("unknown", 0, "digits", score=0.2)
    lucky = [replace(known, name="lucky", score=0.05), Result("lucky", 1, error="why")]
    found = rows([known, unknown, *lucky])
    assert [(row.best, row.passed) for row in found] == [(False, True), (False, None), (True, None)]


def test_lower_is_better_where_the_task_says_so():
    def row(name, score, quality):
        return Row(name, "wikitext103", 1, 0.1, 0.1, score, quality)

    assert comparing.table._beats(row("a", 1, 30), row("b", 1, 35))
    assert not comparing.table._beats(row("a", 1, 35), row("b", 1, 30))
    assert [r.name for r in sorted_rows([row("a", 1, 35), row("b", 2, 30)], "quality")] == ["b", "a"]


@pytest.fixture
def table():
    """Two rows with spread, one of them Pareto-optimal, and one that failed."""
    several = [
        Result("good_1", 0, "digits", 1000, 5000, 0.1, 0.1, 0.2, 0.9, True, 3),
        Result("good_1", 1, "digits", 1000, 5000, 0.1, 0.3, 0.4, 1.0, True, 3),
        Result("good_1", 2, error="unlucky"),
        Result("worse & more", 0, "digits", 2000, 5000, 0.2, 0.3, 0.5, 0.8, False, 3),
        Result("broken", 0, error="why"),
    ]
    return comparing.Comparison(tuple(rows(several)), tuple(several))


def test_columns_for_people_and_programs(table):
    chosen = replace(table, columns=("score", "quality"))
    assert chosen.to_markdown().splitlines() == [
        "|  | strategy | score | quality |",
        "| --- | --- | --- | --- |",
        r"| \* | good\_1 | 0.30000 ±0.14142 | 95.00% ±7.07% |",
        "|  | worse & more | 0.50000 | 80.00% |",
        "|  | broken | failed |  |",
        "",
        r"- good\_1: failed: unlucky",
        "- broken: failed: why",
    ]
    assert chosen.to_latex().splitlines() == [
        "% good_1: failed: unlucky",
        "% broken: failed: why",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"strategy & score & quality \\",
        r"\midrule",
        r"\textbf{good\_1} & 0.30000 $\pm$0.14142 & 95.00\% $\pm$7.07\% \\",
        r"worse \& more & 0.50000 & 80.00\% \\",
        r"broken & failed &  \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert chosen.to_csv().splitlines()[0] == "strategy,score,score_deviation,quality,quality_deviation,errors"
    assert chosen.to_csv().splitlines()[-1] == "broken,,,,,why"
    whole = json.loads(table.to_json())
    assert whole[0]["params32"] == 1000 and whole[0]["pareto"] is True and whole[2]["errors"] == "why"
    assert "<p>good_1: failed: unlucky</p>" in table._repr_html_()
    assert "<td>good_1</td>" in table._repr_html_() and "worse &amp; more" in table._repr_html_()
    assert [row.name for row in sorted_rows(table.rows, "params32")] == ["good_1", "worse & more", "broken"]


def test_wide_terminals_show_more(table):
    def head(width):
        console = Console(width=width, file=io.StringIO())
        console.print(table)
        return console.file.getvalue().splitlines()[1].split()

    assert head(60) == ["strategy", "score", "quality"]
    assert head(100) == ["strategy", "storage", "math", "score", "quality", "time"]
    assert head(200) == ["strategy", "params32", "ops32", "storage", "math", "score", "quality", "time"]


@pytest.mark.parametrize(
    ("columns", "width", "spread"),
    [
        *((None, width, width in (60, 100, 120, 200)) for width in (40, 60, 72, 80, 90, 100, 120, 200)),
        *((("score", "quality"), width, width >= 60) for width in (40, 60, 72, 200)),
    ],
)
def test_no_figure_and_no_name_is_cut(table, columns, width, spread):
    """Deviations take the room of names: they are the first to go, and the note below says so."""
    console = Console(width=width, file=io.StringIO())
    console.print(replace(table, columns=columns))
    shown, _, note = console.file.getvalue().partition("broken: why")
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert {"good_1", "worse", "broken", "failed", "0.30000", "95.00%"} <= set(shown.split())
    assert re.search(r"good_1 .* 95.00%", shown)
    assert ("±" in shown) is ("mean ± standard deviation" in note) is spread


def test_columns_that_were_asked_for_are_folded_where_they_do_not_fit(table):
    console = Console(width=60, file=io.StringIO())
    console.print(replace(table, columns=("task", "params32", "ops32", "storage", "score", "quality", "passed")))
    shown = console.file.getvalue()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 60
    assert {"-", "no"} <= set(shown.split()) and " goo" in shown


@pytest.mark.parametrize("width", [60, 200])
def test_the_live_view_says_how_far_it_is(table, width):
    console = Console(width=width, height=24, file=io.StringIO())
    view = LiveView(total=10, clock=time.monotonic() - 20)
    view.watch(table.results[:2], 2)
    view.watch(table.results, 3)
    console.print(view)
    shown = " ".join(console.file.getvalue().split())
    assert "5 of 10 done, 3 running, 2 failed, 20 s so far, about 33 s left; 2 from before" in shown
    assert "good_1" in shown and "broken: why" in shown


def test_the_live_view_has_room_for_a_reason_behind_a_long_name():
    console = Console(width=60, height=24, file=io.StringIO())
    view = LiveView(total=2)
    view.watch([Result("long" * 30, 0, error="the reason"), Result("other", 0, error="why")], 0)
    console.print(view)
    assert "the reason" in console.file.getvalue()


@pytest.mark.parametrize("width", [60, 160])
def test_the_command(run, base, tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    words = ["compare", "--on", base, "--sparsifier", "magnitude:sparsity=0.5,0.9", "--executor", "here"]
    words += ["--results", tmp_path / "results.sqlite"]
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert "magnitude:sparsity=0.5" in re.sub(r"\s", "", out)
    assert ("storage" in out) == (width > 72)
    code, out, _ = run(*words, "--format", "json", "--sort", "score")
    flat = json.loads(out)
    assert run(*words, "--format", "latex", "--columns", "score,time")[1].count(r"\\") == 3
    status, _, err = run(*words, "--html", tmp_path / "site")
    assert status == 0 and "index.html" in err
    assert json.loads((tmp_path / "site" / "index.json").read_text())[0]["score"] == flat[1]["score"]
    assert [row["strategy"] for row in flat] == ["magnitude:sparsity=0.9", "magnitude:sparsity=0.5"]
    assert "…" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare"], "nothing to compare"),
        (["compare", "--pruner", "random"], "give the recipe that trains it by --on"),
        (["compare", "--on", "BASE", "--pruner", "nope"], "unknown pruner 'nope'"),
        (["compare", "--on", "BASE", "--pruner", "random", "--executor", "cloud"], "unknown executor 'cloud'"),
        (
            ["compare", "--on", "BASE", "--pruner", "random", "--columns", "scor"],
            "unknown column 'scor'; nearest: score",
        ),
        (["compare", "BASE", "--results", ""], "--results: . is no file; name one"),
        (["compare", "BASE", "--results", "/"], "--results: / is no file; name one"),
        (["compare", "BASE", "--results", "r.kept"], "--results: trained networks are kept in r.kept; name another"),
        (["compare", "--on", "BASE", "--pruner", "random", "--sort", "scor"], "unknown order 'scor'; nearest: score"),
    ],
)
def test_bad_words(run, base, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*(base if word == "BASE" else word for word in words))
    assert code == 2
    assert message in err


def test_help_names_every_order(run):
    assert set(comparing.ORDERS) <= set(re.findall(r"\w+", run("compare", "--help")[1]))


def test_no_seed_is_no_comparison(base):
    with pytest.raises(InputError, match="seeds is 0"):
        comparing.compare(base, seeds=0)


def test_the_reason_of_a_failure_can_be_printed(tmp_path):
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    (job,) = jobs_at(tmp_path / os.fsdecode(b"\xff"), 1, None)
    assert r"\udcff/submission.toml is missing" in run(job).error


def test_a_failed_job_is_a_row_with_its_reason(run, base, tmp_path, register):
    class Broken(Sparsifier):
        """Fails."""

        def apply(self, model, context):
            raise InputError("cannot do this")

    class Leaving(Sparsifier):
        """Ends the program."""

        def apply(self, model, context):
            sys.exit("left")

    register(sparsifiers={"broken": Broken, "leaving": Leaving})
    words = ["--sparsifier", "broken", "--sparsifier", "leaving", "--sparsifier", "random", "--executor", "here"]
    code, out, _ = run("compare", "--on", base, *words, "--results", tmp_path / "r.sqlite")
    assert code == 1
    assert "failed" in out
    assert "cannot do this" in out
    assert "leaving: SystemExit: left" in out
    assert isinstance(Job("x").key, str)
