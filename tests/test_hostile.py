"""Submissions that mean harm, and submissions that are broken in ways that hang or crash a program."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, RECIPE, own_folder
from pydantic import ValidationError

from micronet_eval import bounds, isolation, packing, quality
from micronet_eval.batches import check_batches
from micronet_eval.errors import InputError, SubmissionError
from micronet_eval.evaluation import evaluate, score
from micronet_eval.graph import MOST_NUMBERS, Graph, model_of, uncounted_numbers
from micronet_eval.isolation import NO_CODE, Isolation, Limits, graph_of_file
from micronet_eval.plugins import lookup
from micronet_eval.structure import StructureError
from micronet_eval.trace import trace

LEVELS = ["limits only", pytest.param("bubblewrap", marks=pytest.mark.skipif(
    isolation.bubblewrap() is None, reason="bubblewrap is not installed, or has no namespaces"))]  # fmt: skip


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    if request.param == "limits only":
        monkeypatch.setattr(isolation, "bubblewrap", lambda: None)
    return request.param


@pytest.fixture
def sandbox():
    if isolation.bubblewrap() is None:
        pytest.skip("bubblewrap is not installed, or has no namespaces")


def run_code(folder, code, **limits):
    """Runs a model.py; gives the message that it ends with."""
    (folder / "model.py").write_text(code)
    with pytest.raises(SubmissionError) as end:
        graph_of_file(folder / "model.py", {}, Isolation(limits=Limits(**limits)))
    return str(end.value)


FORKS = "import os, time\nfor i in range({}): os.fork() or {}\ntime.sleep(9)"


# --- model.py: what it does to the machine ---


@pytest.mark.attack("exits with status 0, or crashes", "one message, exit status 3")
@pytest.mark.attack("loops for ever", "ended at `--limits wall` or `cpu`")
@pytest.mark.attack("allocates 100 GB, alone or in many processes", "ended at `--limits memory`")
@pytest.mark.attack("starts many processes", "ended at `--limits processes`")
@pytest.mark.attack("opens files without end", "refused at `--limits files`")
@pytest.mark.attack("writes without end", "refused at `--limits written`")
@pytest.mark.attack("prints a fake report", "nobody reads what it prints")
@pytest.mark.attack("returns anything but a module", "one message, exit status 3")
@pytest.mark.parametrize(
    ("code", "limits", "message"),
    [
        ("raise SystemExit(0)", {}, "SystemExit: 0"),
        ("import os; os._exit(0)", {}, "ended without a model, with exit status 0"),
        ("import ctypes; ctypes.string_at(0)", {}, "ended by SIGSEGV"),
        ("while True: pass", {"wall": 1}, "ran for more than 1 seconds (--limits wall)"),
        ("while True: pass", {"cpu": 1}, "(--limits cpu)"),
        ("x = bytearray(100 << 30)", {}, "MemoryError"),
        (FORKS.format(9, "[bytearray(b'x') * (90 << 20), time.sleep(9)]"), {"memory": 256 << 20}, "(--limits memory)"),
        (FORKS.format(40, "time.sleep(9)"), {"processes": 9}, "BlockingIO|proces"),
        ("x = [open('/dev/null') for i in range(999)]", {"files": 64}, "Too many open files"),
        ("f = open('big', 'wb')\nfor i in range(99): f.write(bytes(1 << 20))", {"written": 1 << 20}, "OSError|SIGXFSZ"),
        ("print('{\"score\": 0}')", {}, "no function build()"),
        ("def build(): return 3", {}, "model.py: TypeError: build() has to return an nn.Module, not int"),
        ("def build(*, width): return 3", {}, "model.py: field 'architecture.width': Field required (add this field)"),
        ("raise ValueError('\\x1b[2J\\u202eevil')", {}, r"ValueError: \x1b[2J\u202eevil"),
    ],
)  # fmt: skip
def test_code_that_fails_or_hits_a_limit(level, tmp_path, code, limits, message):
    told = run_code(tmp_path, code, **limits)
    assert any(part in told for part in message.split("|")), told
    assert told.startswith(str(tmp_path))


@pytest.mark.attack("forks without end", "ended; no process is left")
def test_a_fork_bomb_leaves_nothing_behind(level, tmp_path):
    began = time.monotonic()
    (tmp_path / "model.py").write_text("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    with pytest.raises(SubmissionError):
        graph_of_file(tmp_path / "model.py", {"mark": str(tmp_path)}, Isolation(limits=Limits(processes=12, wall=10)))
    assert time.monotonic() - began < 30
    assert not running(str(tmp_path))


def running(mark):
    """The processes that have a text among their words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path] if mark.encode() in path.read_bytes() else []
    return found


@pytest.mark.attack("forges the worker's answer: a report, a pickle, JSON 100,000 deep", "refused: no graph of a model")
@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b'{"score": {"total": 0}}', "no graph"),
        (pickle.dumps(os.system), "no graph"),
        (b"[" * 100_000, "no graph"),
        (b'{"layers": {}, "tensors": {}, "nodes": []}', "no output"),
    ],
)
def test_what_the_code_writes_on_the_workers_descriptor_is_only_data(level, tmp_path, written, message):
    code = f"""
import os
for fd in map(int, os.listdir("/proc/self/fd")):
    try: os.write(fd, {written!r}) if os.readlink(f"/proc/self/fd/{{fd}}").startswith("pipe:") else None
    except OSError: pass
os._exit(0)
"""
    (tmp_path / "model.py").write_text(code)
    with pytest.raises((SubmissionError, StructureError), match=message):
        model_of(graph_of_file(tmp_path / "model.py", {}, Isolation()))


@pytest.mark.attack("reads /etc/passwd, the folder of --data, its neighbours", "there are no such files")
@pytest.mark.parametrize("place", ["/etc/passwd", "/etc/shadow", "{data}/test_labels", "{folder}/../beside"])
def test_code_in_bubblewrap_reads_nothing_else(sandbox, tmp_path, place):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "test_labels", tmp_path / "beside"):
        path.write_text("secret")
    told = run_code(folder, f"raise ValueError(open({place.format(data=tmp_path, folder=folder)!r}).read())")
    assert "FileNotFoundError" in told


@pytest.mark.attack("writes outside of its scratch folder", "read-only")
def test_code_in_bubblewrap_writes_nothing_outside(sandbox, tmp_path):
    (tmp_path / "there").write_text("before")
    code = f"""
for path in ({str(tmp_path / "there")!r}, {str(tmp_path / "new")!r}, {sys.prefix + "/new"!r}, "/submission/model.py"):
    try:
        open(path, "w").write("after")
    except OSError: continue
    raise ValueError("wrote " + path)
"""
    assert "no function build()" in run_code(tmp_path, code)
    assert (tmp_path / "there").read_text() == "before"
    assert not (tmp_path / "new").exists()
    assert not Path(sys.prefix, "new").exists()


@pytest.mark.attack("opens a socket", "there is no network")
def test_code_in_bubblewrap_has_no_network(sandbox, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told = run_code(tmp_path, f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)")
    assert "OSError" in told or "ConnectionRefusedError" in told


@pytest.mark.attack("kills its parent, and all that it can", "it does not see them")
def test_code_in_bubblewrap_cannot_kill_its_parent(sandbox, tmp_path):
    code = f"""
import os
for pid in (os.getppid(), {os.getpid()}, -1):
    try: os.kill(pid, 9)
    except OSError: pass
"""
    run_code(tmp_path, code)  # this process is still here to be told


@pytest.mark.attack("reads the environment", "it is empty")
def test_the_environment_is_not_shown(level, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hush")
    assert "None" in run_code(tmp_path, "import os; raise ValueError(os.environ.get('SECRET'))")


# --- model.py: what it does to the count ---


def test_a_model_of_ones_own_is_counted_and_measured(level, own):
    report = evaluate(own)
    assert report.isolation == level
    assert any("limits only" in warning for warning in report.warnings) is (level == "limits only")
    # Convolution 9 x 3 x 64, batch norm merged into it; relu 3 x 64; gain 3 x 16; linear 48 x 10.
    assert report.math.mults == 1728 + 192 + 48 + 480
    assert report.storage.parameters == 27 + 3 + 3 + 480 + 10
    assert report.quality.examples == 449


def test_registered_architectures_run_no_code(submission, monkeypatch):
    monkeypatch.setattr(isolation, "_run", None)
    assert evaluate(submission).isolation == NO_CODE


@pytest.mark.attack("patches torch or the counter", "the report is the same")
def test_patches_of_torch_and_of_the_counter_change_nothing(own, tmp_path):
    patches = """
import sys, torch, json
import micronet_eval.scoring, micronet_eval.evaluation, micronet_eval.graph
micronet_eval.scoring.score = micronet_eval.evaluation.evaluate = lambda *a, **k: 0
torch.Tensor.argmax = lambda *a, **k: 0
torch.nn.Linear.forward = lambda self, x: x
"""
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "model.py").write_text(patches + MODEL)
    assert evaluate(folder) == evaluate(own)


ACROSS = MODEL.replace(
    "return self.head(x.view(x.shape[0], -1))",
    """x = x.view(x.shape[0], -1)
        return self.head(x) + (x @ x.t()).sum(1, keepdim=True)""",
)


@pytest.mark.attack("computes across the examples of a batch", "refused: what is counted has to be what is measured")
def test_a_model_that_costs_more_for_a_batch_than_its_examples(tmp_path):
    with pytest.raises(InputError, match="depend on the others of its batch"):
        evaluate(own_folder(tmp_path / "own", ACROSS))


def test_batches_are_compared_where_nothing_is_measured(tmp_path, monkeypatch):
    unmeasured = quality.not_measured(lookup("task", "digits"), None, "no data")
    monkeypatch.setattr("micronet_eval.evaluation.measure", lambda *words, apart: unmeasured)
    with pytest.raises(InputError, match=r"does something else for 100 examples at once than for one.*aten.mm"):
        evaluate(own_folder(tmp_path / "own", ACROSS))


@pytest.mark.attack(
    "normalizes with the statistics of the batch, looks at the others in it", "refused: others change nothing"
)
@pytest.mark.parametrize(
    "outputs",
    [
        "self.head(x) + nn.functional.batch_norm(x.view(-1, 4, 12), None, None, training=True).flatten(1)[:, :10]",
        "self.head(x) - self.head(x).mean(0)",
        "self.head(x - x[0:1])",
        "self.head(x - x[-1:])",
        "self.head(x) + self.head(x).amax(0, keepdim=True)",
        "self.head(x).cumsum(0)",
    ],
)
def test_a_model_that_looks_at_the_others_of_its_batch(tmp_path, outputs):
    code = MODEL.replace(LAST, f"x = x.view(x.shape[0], -1)\n        return {outputs}")
    with pytest.raises(InputError, match=r"depend on the others of its batch|does something else for 49 examples"):
        evaluate(own_folder(tmp_path / "own", code))


@pytest.mark.attack("tells labels by where an example stands in the test set", "the order is drawn")
@pytest.mark.parametrize(("apart", "right"), [(False, range(1000, 1001)), (True, range(400, 600))])
def test_a_model_that_knows_the_order_of_the_test_set(apart, right):
    class ByPlace(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.arange(len(x)) // 50 % 2, 10).float()

    ordered = torch.utils.data.TensorDataset(torch.rand(1000, 64), torch.arange(1000) // 50 % 2)
    task = replace(lookup("task", "digits"), dataset=lambda root, split: ordered)
    assert quality.measure(ByPlace(), task, None, apart=apart).measured * 1000 in right


class BySize(torch.nn.Module):
    """Knows by the size of its batch that it is traced: all its weights only then have no part in it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64, 500))

    def forward(self, x):
        n = (x.shape[0] - 1) * 500 // 99
        return x + (x @ self.weight[:, :n]).sum(1, keepdim=True)


@pytest.mark.attack("sees by the size of its batch that it is counted", "refused: every size is traced, too")
def test_a_model_that_sees_by_its_batch_that_it_is_traced():
    one = trace(BySize(), torch.zeros(1, 64))
    check_batches(BySize(), (64,), one, [1])
    with pytest.raises(InputError, match="does something else for 100 examples at once than for one"):
        check_batches(BySize(), (64,), one, [100])


class ByPlace(torch.nn.Module):
    """One example meets weights that are all zero, a hundred meet others of the same shape."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.cat([torch.zeros(64, 64), torch.ones(64, 99)], 1))

    def forward(self, x):
        n = x.shape[0] - 1
        return x @ self.weight[:, n : n + 64]


class ByNumber(torch.nn.Module):
    def forward(self, x):
        return x * (1 + (x.shape[0] // 2) * 0.0137)


class ByBound(torch.nn.Module):
    def forward(self, x):
        return x.clamp(max=x.shape[0])


@pytest.mark.attack(
    "takes other weights, or other numbers, for a batch than for one example", "refused: they are compared"
)
@pytest.mark.parametrize("model", [ByPlace, ByNumber, ByBound])
def test_a_model_that_takes_other_values_for_a_batch(model):
    one = trace(model(), torch.zeros(1, 64))
    check_batches(model(), (64,), one, [1])
    with pytest.raises(InputError, match="does something else for 100 examples at once than for one"):
        check_batches(model(), (64,), one, [100])


@pytest.mark.attack("branches on values", "refused: it cannot be traced")
def test_a_forward_that_looks_at_values_is_no_graph(tmp_path):
    code = MODEL.replace("x = nn.func", "if x.sum() > 0: return x\n        x = nn.func")
    assert "cannot be traced" in run_code(tmp_path, code)


def test_options_that_are_longer_than_a_command_line(level, tmp_path):
    (tmp_path / "model.py").write_text(MODEL.replace("build(width=4)", "build(width=4, note='')"))
    assert graph_of_file(tmp_path / "model.py", {"note": "a" * 200_000}, Isolation()).layers


@pytest.mark.attack("gives back its answer a byte at a time", "ended at `--limits wall`")
def test_an_answer_that_trickles():
    read, write = os.pipe()

    def trickle():
        with contextlib.suppress(OSError):  # nobody reads any more
            for _ in range(60):
                os.write(write, bytes(1 << 20))
            while True:
                os.write(write, b"0")

    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    threading.Thread(target=trickle, daemon=True).start()
    try:
        with pytest.raises(isolation._Ended, match=r"ran for more than 1 seconds \(--limits wall\)"):
            isolation._answer(process, read, Limits(wall=1), watched=True)
    finally:
        os.close(read)
        isolation._kill(process)


@pytest.mark.attack("brings a recipe, so that its code is run again", "refused: no recipe makes code")
def test_code_is_not_run_to_reproduce_it(own, run, tmp_path):
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "model.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')")
    status, out, err = run("reproduce", folder)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "field 'architecture.file'" in err
    assert not (tmp_path / "was here").exists()


EVIL = "x=__import__('os').system('true')"


@pytest.mark.attack("makes up a graph that calls anything", "refused: it is not on the list")
@pytest.mark.parametrize(
    "node",
    [
        {"op": "call_function", "name": "a", "target": "os.system", "args": ["true"]},
        {"op": "call_function", "name": "a", "target": "builtins.getattr", "args": [{"node": "x"}, "__class__"]},
        {"op": "call_method", "name": "a", "target": "__reduce__", "args": [{"node": "x"}]},
        {"op": "call_method", "name": "a", "target": f"abs(); {EVIL}", "args": [{"node": "x"}]},
        {"op": "call_method", "name": "a", "target": "abs", "args": [{"node": "x"}], "kwargs": {EVIL: 1}},
        {"op": "call_method", "name": f"a; {EVIL}", "target": "abs", "args": [{"node": "x"}]},
        {"op": "call_method", "name": "аbs", "target": "abs", "args": [{"node": "x"}]},  # its first letter is Cyrillic
        {"op": "placeholder", "name": "y", "target": f"y={EVIL}"},
        {"op": "get_attr", "name": "a", "target": "__class__.__init__"},
        {"op": "get_attr", "name": "a", "target": f"w.{EVIL}"},
        {"op": "call_module", "name": "a", "target": "missing", "args": [{"node": "x"}]},
        {"op": "call_method", "name": "a", "target": "abs", "args": [{"node": "later"}]},
        {"op": "call_method", "name": "a", "target": "abs", "args": [{"dtype": "__loader__"}]},
        {"op": "call_method", "name": "a", "target": "abs", "args": [{"code": "x", "node": "x"}]},
        {"op": "call_method", "name": "x", "target": "abs", "args": [{"node": "x"}]},
    ],
)
def test_a_graph_that_a_worker_made_up(node):
    nodes = [{"op": "placeholder", "name": "x", "target": "x"}, node,
             {"op": "output", "name": "output", "target": "output", "args": [{"node": "x"}]}]  # fmt: skip
    with pytest.raises((ValidationError, StructureError)):
        model_of(Graph.model_validate_json(json.dumps({"layers": {}, "tensors": {}, "nodes": nodes})))


def test_import_copies_the_code_and_a_recipe_refuses_it(own, run, tmp_path):
    status, _, err = run("import", own, own / "state.pt", "-o", tmp_path / "out")
    assert status == 0, err
    assert (tmp_path / "out" / "model.py").read_text() == MODEL
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == (own / "weights.safetensors").read_bytes()
    recipe = (
        RECIPE[: RECIPE.index("[architecture]")]
        + '[architecture]\nfile = "model.py"\n[[stages]]\nmerge = "batch-norm"\n'
    )
    (tmp_path / "recipe.toml").write_text(recipe)
    status, _, err = run("compress", tmp_path / "recipe.toml", "-o", tmp_path / "made")
    assert (status, err.count("\n")) == (2, 1)
    assert "a registered architecture, by name" in err


def test_isolation_that_is_required_and_cannot_be_had(own, run, monkeypatch):
    monkeypatch.setattr(isolation, "bubblewrap", lambda: None)
    status, out, err = run(own, "--isolation", "required")
    assert (status, out) == (2, "")
    assert "install it" in err


@pytest.mark.parametrize(
    "text",
    [
        "memory",
        "memory=",
        "memory=-1",
        "memory=4T",
        "cpu=1e9",
        "colour=1",
        "wall=²",
        "cpu=" + "9" * 5_000,
        "cpu=" + "0" * 5_000 + "1",
        "evaluation=999999999999",
    ],
)
def test_limits_that_are_none(own, run, text):
    status, _, err = run(own, "--limits", text)
    assert status == 2
    assert "is no limit" in err


def test_exit_status_3_where_the_code_fails(own, run, tmp_path):
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "model.py").write_text("1 / 0")
    status, out, err = run(folder)
    assert (status, out, err.count("\n")) == (3, "", 1)
    assert "ZeroDivisionError" in err


# --- model.py: what it hides ------------------------------------------------------------------------------------------

LAST = "return self.head(x.view(x.shape[0], -1))"
GAIN = "self.gain = nn.Parameter(torch.ones(1, width, 1, 1))"
SECRET = "torch.randn(10, generator=torch.Generator().manual_seed(1))"


@pytest.mark.attack("hides weights in buffers, attributes, closures or globals", "refused: the file lacks them")
@pytest.mark.attack("computes weights at run time from a seed", "refused: the file lacks them")
@pytest.mark.parametrize(
    "hidden",
    [
        MODEL.replace(GAIN, f"{GAIN}\n        self.register_buffer('b', {SECRET})").replace(LAST, f"{LAST} + self.b"),
        MODEL.replace(GAIN, f"{GAIN}\n        self.b = {SECRET}").replace(LAST, f"{LAST} + self.b"),
        MODEL.replace("class Net", f"B = {SECRET}\n\nclass Net").replace(LAST, f"{LAST} + B"),
        MODEL.replace("class Net", f"def f(b={SECRET}):\n    return lambda x: x + b\n\nclass Net").replace(
            LAST, "return f()(self.head(x.view(x.shape[0], -1)))"
        ),
        MODEL.replace(LAST, f"{LAST} + {SECRET}"),
        MODEL.replace(LAST, f"{LAST} + torch.tensor([float(i) for i in range(10)])"),
    ],
    ids=["buffer", "attribute", "global", "closure", "seed", "constants"],
)
def test_weights_outside_of_the_file(own, tmp_path, hidden):
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "model.py").write_text(hidden)
    with pytest.raises(InputError, match="the file lacks 1 tensors"):
        evaluate(folder)


@pytest.mark.attack("hides weights as numbers of its code", "each is stored as a parameter is")
def test_numbers_that_are_multiplied_or_added_are_stored(own, tmp_path):
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "model.py").write_text(MODEL.replace(LAST, f"{LAST} * 0.3 + 0.7"))
    before, after = evaluate(own).storage, evaluate(folder).storage
    assert after.bits == before.bits + 2 * 16  # the 16-bit freebie is theirs as well
    assert after.code_bits == 2 * 16


@pytest.mark.attack("hides weights in bounds, paddings and comparisons", "refused: at most 16 such numbers")
def test_numbers_that_no_rule_counts(tmp_path):
    def clamped(many):  # two numbers each
        clamps = "".join(f".clamp(min={-0.31 - i}, max={0.37 + i})" for i in range(many))
        return MODEL.replace(LAST, f"return self.head(x.view(x.shape[0], -1)){clamps}")

    assert evaluate(own_folder(tmp_path / "few", clamped(8))).storage.code_bits == 0
    with pytest.raises(InputError, match=r"model\.py has 18 numbers in its code that are not counted.*at most 16"):
        evaluate(own_folder(tmp_path / "many", clamped(9)))


@pytest.mark.attack("hides weights in paddings of constants", "refused: at most 16 such numbers; each is stored")
def test_numbers_that_constants_are_made_with():
    class Padded(torch.nn.Module):
        def __init__(self, many):
            super().__init__()
            self.p, self.many = torch.nn.Parameter(torch.ones(1)), many

        def forward(self, x):
            pads = [torch.nn.functional.pad(self.p[:0], (0, 1), value=i + 0.37) for i in range(self.many)]
            return x * torch.cat(pads)

    x = torch.zeros(1, 17)
    assert len(uncounted_numbers(trace(Padded(17), x))) == 17 > MOST_NUMBERS
    assert score(Padded(17), x).storage.bits == 17 * 16  # and they are stored, by the freebie at 16 bits


@pytest.mark.attack("computes on nothing, at a cost below zero", "costs nothing")
@pytest.mark.parametrize(
    "nothing",
    ["{0}.unsqueeze(2).expand(-1, 0, 999).sum(1)", "{0}.unsqueeze(2).expand(-1, 0, 999).prod(1)", "{0} @ {0}[0]"],
)
def test_operations_on_nothing(own, tmp_path, nothing):
    line = "none = " + nothing.format("x.view(x.shape[0], -1)[:, :0]")
    folder = own_folder(tmp_path / "own", MODEL.replace(LAST, f"{line}\n        {LAST}"))
    assert evaluate(folder).math.ops32 == evaluate(own).math.ops32


@pytest.mark.attack("changes its weights while it is measured", "refused: a hash before and after")
def test_weights_that_change_while_the_model_runs(own, tmp_path):
    changing = MODEL.replace("* self.gain", "* self.gain.mul_(2)")
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "model.py").write_text(changing)
    with pytest.raises(InputError, match=r"the model changes 'gain' while it runs"):
        evaluate(folder)


@pytest.mark.attack("has other weights from the second batch on, behind zeros that are counted", "refused when traced")
@pytest.mark.parametrize("change", ["self.a.mul_(0).add_(self.b)", "torch.mul(self.b, 1, out=self.a)"])
@pytest.mark.parametrize("kind", ["fixed-point:8", "float32"])
def test_weights_that_change_behind_their_first_use(tmp_path, change, kind):
    """A quantized weight is computed once for all batches: a hash of what it is computed from does not see a change."""
    ours = f"{GAIN}\n        self.a, self.b = (nn.Parameter(torch.full((width * 16, 10), i)) for i in (0.0, 1.0))"
    body = f"x = x.view(x.shape[0], -1)\n        y = self.head(x) + x @ self.a\n        {change}\n        return y"
    plain = MODEL.replace("nn.BatchNorm2d(width)", "nn.Identity()")
    folder = own_folder(tmp_path / "own", plain)
    (folder / "model.py").write_text(plain.replace(GAIN, ours).replace(LAST, body))
    names = dict.fromkeys(("conv.weight", "conv.bias", "gain", "head.weight", "head.bias"), "float32")
    shapes = {"conv.weight": (3, 1, 3, 3), "conv.bias": (3,), "gain": (1, 3, 1, 1), "head.weight": (10, 48)}
    values = {name: torch.ones(shapes.get(name, (10,))) for name in names}
    values |= {"a": torch.zeros(48, 10), "b": torch.ones(48, 10)}
    structure = packing.Structure(tensors=[(n, names.get(n, kind), "plain") for n in values])
    nothing, exponents = np.zeros(0, np.uint8), np.zeros(2 if kind != "float32" else 0, np.uint8)
    streams = {"values": nothing, "masks": nothing, "overhead": exponents}
    packing.write(packing.Packed(structure, streams, values), folder / "weights.safetensors")
    with pytest.raises(InputError, match=r"the model changes .* while it runs"):
        evaluate(folder)


@pytest.mark.attack("reads wide integers as several narrow numbers", "stored as the numbers that are used")
def test_bits_that_are_read_as_another_dtype():
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            four = torch.arange(1, 65).half().view(torch.int64)
            self.wide = torch.nn.Parameter(four.clone(), requires_grad=False)

        def forward(self, x):
            return x @ self.wide.view(torch.float16).float().view(8, 8)

    # 64 numbers of 16 bits; the 16 integers that hold them would be 256 bits by the freebie.
    assert score(Wide(), torch.zeros(1, 8)).storage.bits == 64 * 16


@pytest.mark.attack("computes in float64, two values in each", "refused")
def test_numbers_of_64_bits(tmp_path):
    wide = MODEL.replace(GAIN, f"{GAIN}\n        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))")
    assert "float64" not in str(Graph.model_json_schema())
    told = run_code(tmp_path, wide.replace(LAST, f"{LAST} * self.w"))
    assert "ValidationError" in told


@pytest.mark.attack("has a file with wider numbers than its code", "refused")
@pytest.mark.parametrize("kind", ["float64", "int64"])
def test_numbers_of_64_bits_in_the_file(own, tmp_path, kind):
    code = MODEL.replace(GAIN, f"{GAIN}\n        self.register_buffer('wide', torch.zeros(10))")
    folder = own_folder(tmp_path / "own", code.replace(LAST, f"{LAST} * self.wide"))
    packed = packing.read(folder / "weights.safetensors")
    tensors = [(n, kind if n == "wide" else spec, layout) for n, spec, layout in packed.structure.tensors]
    tensors += [("wide", kind, "plain")] * all(n != "wide" for n, *_ in tensors)
    tensors = [(n, spec, "plain" if n == "wide" else layout) for n, spec, layout in tensors]
    values = {"wide": torch.arange(10).to(getattr(torch, kind))}
    changed = packing.Packed(
        packing.Structure(**{**packed.structure.model_dump(), "tensors": tensors}), packed.streams, values
    )
    packing.write(changed, folder / "weights.safetensors")
    with pytest.raises(InputError, match=f"tensor 'wide' is {kind}, but torch.float32 in the architecture"):
        evaluate(folder)


@pytest.mark.attack("hides weights in a graph of many operations and arguments", "refused: at most 20,000 arguments")
@pytest.mark.parametrize("argument", [{"node": "x"}, []])
def test_a_graph_that_is_too_large(argument):
    many = [argument] * 20_001
    nodes = [{"op": "placeholder", "name": "x", "target": "x"},
             {"op": "call_function", "name": "a", "target": "torch.cat", "args": [many]},
             {"op": "output", "name": "output", "target": "output", "args": [{"node": "a"}]}]  # fmt: skip
    with pytest.raises(StructureError, match=r"20,003 arguments; at most 20,000"):
        model_of(Graph.model_validate({"layers": {}, "tensors": {}, "nodes": nodes}))


@pytest.mark.attack("behaves otherwise while it is traced", "only what was traced is ever run")
def test_a_forward_that_knows_that_it_is_traced(tmp_path):
    two = MODEL.replace("x = nn.func", "if type(x).__name__ != 'Proxy': return answers(x)\n        x = nn.func")
    assert evaluate(own_folder(tmp_path / "two", two)) == evaluate(own_folder(tmp_path / "one")).model_copy(
        update={"submission": "two"}
    )


@pytest.mark.attack("gives outputs that are compared with the labels of all examples", "refused: a row for each")
@pytest.mark.parametrize("shape", ["[:, :, None]", ".view(1, -1)", "[0]"])
def test_outputs_of_another_shape(tmp_path, shape):
    with pytest.raises((InputError, SubmissionError), match=r"a row of classes for each|for 49 examples at once|fails"):
        evaluate(own_folder(tmp_path / "own", MODEL.replace(LAST, f"{LAST}{shape}")))


@pytest.mark.attack("gives outputs that are no numbers", "refused")
def test_outputs_that_are_no_numbers(tmp_path):
    broken = MODEL.replace(LAST, f"{LAST.replace('return', 'x =')}\n        return (x - x) / (x - x)")
    with pytest.raises(InputError, match="outputs are not numbers"):
        evaluate(own_folder(tmp_path / "own", broken))


@pytest.mark.attack("gives log-probabilities of which one is no number", "refused: they do not sum to one")
def test_log_probabilities_that_hide_behind_nan():
    certain = torch.zeros(1, 3, 5)
    certain[..., 4] = torch.nan
    with pytest.raises(InputError, match="returns no log-probabilities"):
        quality._chosen(certain, torch.zeros(1, 3, dtype=torch.int64))


# --- evaluations without end ------------------------------------------------------------------------------------------


@pytest.mark.attack("an architecture with options that take days", "ended at `--limits evaluation`, exit status 3")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the first end can get lost, see below
def test_an_evaluation_without_end(submission, run):
    manifest = submission / "submission.toml"
    manifest.write_text(manifest.read_text().replace("depth = 10", "depth = 6000004"))
    status, out, err = run(submission, "--limits", "evaluation=2")
    assert (status, out) == (3, "")
    assert err == f"micronet-eval: {submission}: it took more than 2 seconds (--limits evaluation)\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_import_without_end(submission, run, tmp_path):
    manifest = submission / "submission.toml"
    manifest.write_text(manifest.read_text().replace("depth = 10", "depth = 6000004"))
    torch.save({}, tmp_path / "state.pt")
    words = ("import", submission, tmp_path / "state.pt", "-o", tmp_path / "out", "--limits", "evaluation=2")
    status, _, err = run(*words)
    assert (status, err.count("\n")) == (3, 1)
    assert "it took more than 2 seconds" in err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_end_that_got_lost_comes_again(monkeypatch):
    monkeypatch.setattr(bounds, "AGAIN", 0.1)

    class Slow:
        def __del__(self):  # what is raised here is only printed
            time.sleep(1.3)

    with pytest.raises(SubmissionError, match="more than 1 seconds"), bounds.bounded(1, "it"):
        Slow()
        time.sleep(30)


@pytest.mark.parametrize("slow", ["in", "out"])
def test_no_end_comes_on_the_way_into_a_context_or_out_of_it(slow):
    """It would leave gradients off, as `torch.no_grad` does when it is ended there."""
    came = []

    @contextlib.contextmanager
    def context():
        time.sleep(1.2 if slow == "in" else 0)
        came.append("in")
        yield
        time.sleep(1.2 if slow == "out" else 0)
        came.append("out")

    with pytest.raises(SubmissionError, match="more than 1 seconds"), bounds.bounded(1, "it"):
        with context():
            pass
        time.sleep(30)
    assert came == ["in", "out"]


@pytest.mark.attack("a model whose activations take more memory than there is", "one message, exit status 3")
def test_a_model_that_needs_more_memory_than_there_is(own, run, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_AS)
    folder = shutil.copytree(own, tmp_path / "own")
    squared = "y = x.view(-1, 1) @ x.view(1, -1)\n        y = y.view(-1, 1) @ y.view(1, -1)\n        "
    grown = MODEL.replace(LAST, f"{squared}{LAST} + y.mean()")
    (folder / "model.py").write_text(grown)
    status, out, err = run(folder)
    assert (status, out, err.count("\n")) == (3, "", 1)
    assert "needs more memory than this machine has free" in err
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    "command", ["evaluate", "check", "compare", "leaderboard", "explain", "diff", "rules", "validate", "import"]
)
def test_every_command_that_opens_a_submission_asks_for_isolation(own, run, monkeypatch, tmp_path, command):
    monkeypatch.setattr(isolation, "bubblewrap", lambda: None)
    monkeypatch.setenv("COLUMNS", "200")  # validate tells it in a table
    words = {"explain": [own, "conv"], "diff": [own, own], "import": [own, own / "state.pt", "-o", tmp_path / "out"]}
    more = {"compare": ["--results", tmp_path / "results", "--executor", "here"]}
    _, out, err = run(command, *words.get(command, [own]), *more.get(command, []), "--isolation", "required")
    assert "--isolation required: bubblewrap does not work here" in out + err


def test_the_report_says_at_which_level_the_code_was_run(level, own, run):
    _, out, _ = run(own)
    assert f"isolation {level}" in " ".join(out.split())
