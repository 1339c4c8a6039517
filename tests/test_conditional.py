"""Models with several paths: what each costs, their mean, shares measured and claimed, what an author gets wrong."""

import json
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

import micronet_eval
from micronet_eval import packing
from micronet_eval.conditional import Conditional, taking
from micronet_eval.costs import FORMULAS
from micronet_eval.errors import InputError
from micronet_eval.formats import Affine, AffineQuantizer, FixedPointQuantizer
from micronet_eval.merge import merged
from micronet_eval.report import render_explanations
from micronet_eval.structure import ScaleShift
from micronet_eval.trace import trace
from micronet_plugins.tasks import digits

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "report.schema.json").read_text())
EXAMPLE = torch.zeros(1, 4)
SHARES = {"short": 0.25, "long": 0.75}


class Fork(Conditional):
    """By hand: trunk 12 mults, 9 adds; decision 1 add; short way 6, 4; long way 15 + 10, 10 + 8 and 2 biases."""

    paths = ("short", "long")

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 3, bias=False)
        self.near = nn.Linear(3, 2, bias=False)
        self.far = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2))

    def run(self, x):
        x = self.trunk(x)
        if self.takes("short", x[:, 0] > 0):
            return self.near(x)
        return self.far(x)


def fork():
    torch.manual_seed(0)
    return Fork().eval()


# --- counted ----------------------------------------------------------------------------------------------------------


@pytest.mark.rule("math.paths")
def test_each_path_and_their_mean():
    report = micronet_eval.score(fork(), EXAMPLE, shares=SHARES)
    short, long = report.paths
    assert (short.name, short.share, short.mults, short.adds) == ("short", 0.25, 12 + 6, 9 + 1 + 4)
    assert (long.name, long.share, long.mults, long.adds) == ("long", 0.75, 12 + 15 + 10, 9 + 1 + 10 + 8 + 2)
    assert not short.measured
    assert (report.math.mults, report.math.adds) == (0.25 * 18 + 0.75 * 37, 0.25 * 14 + 0.75 * 30)
    assert report.math.ops32 == (0.25 * 18 + 0.75 * 37) / 2 + (0.25 * 14 + 0.75 * 30)  # the freebie's 16 bits
    assert report.math.ops32 == 0.25 * short.ops32 + 0.75 * long.ops32


def test_storage_is_that_of_all_paths_each_tensor_once():
    storage = micronet_eval.score(fork(), EXAMPLE, shares=SHARES).storage
    assert storage.parameters == 12 + 6 + 15 + 10 + 2
    assert storage.bits == 45 * 16


def test_the_layers_add_up_and_what_is_common_to_all_paths_is_one():
    report = micronet_eval.score(fork(), EXAMPLE, shares=SHARES)
    mults = {layer.module: layer.mults for layer in report.layers if layer.mults}
    assert mults == {"trunk": 12, "near": 0.25 * 6, "far.0": 0.75 * 15, "far.1": 0.75 * 10}
    assert sum(layer.ops32 for layer in report.layers) == report.math.ops32
    assert sum(layer.storage_bits for layer in report.layers) == report.storage.bits


def test_explanations_are_of_paths_and_by_their_shares_make_up_the_report():
    report = micronet_eval.score(fork(), EXAMPLE, shares=SHARES)
    found = report.explain()
    for figure in ("mults", "adds", "ops32", "storage_bits"):
        means = Counter()
        for e in found:
            means[e.module] += getattr(e, figure) * (1 if figure == "storage_bits" else e.share)
        layers = Counter()
        for layer in (*report.layers, *report.free_layers):
            layers[layer.module] += getattr(layer, figure)
        assert +means == +layers
    (near,) = [e for e in found if e.module == "near"]
    assert (near.path, near.share, near.mults) == ("short", 0.25, 6)
    assert near.lines[0] == ("path", "short, which has a share of 0.25 in the mean of the report")
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_explanations(found))
    assert f"together {report.math.mults:,} mults, {report.math.adds:,} adds" in capture.get()


def test_decimal_shares_are_exact():
    math = micronet_eval.score(fork(), EXAMPLE, shares={"short": 0.1, "long": 0.9}).math
    assert math.mults == 35.1  # 1.8 + 33.3; in floats 35.1 would be 35.099999999999994 or so
    assert micronet_eval.score(fork(), EXAMPLE, shares={"short": 0, "long": 1}).math.mults == 37


def test_a_part_of_a_model_can_be_conditional():
    whole = nn.Sequential(nn.Linear(4, 4, bias=False), fork())
    assert micronet_eval.score(whole, EXAMPLE, shares=SHARES).math.mults == 16 + 0.25 * 18 + 0.75 * 37


def test_quantization_below_16_bits_on_one_path_ends_the_freebie_for_all():
    model = fork()
    parametrize.register_parametrization(model.near, "weight", FixedPointQuantizer(8, -7))
    report = micronet_eval.score(model, EXAMPLE, shares=SHARES)
    assert not report.freebie
    assert report.storage.value_bits == 6 * 8 + 39 * 32
    assert report.paths[1].ops32 == 37 + 30


# --- run --------------------------------------------------------------------------------------------------------------


def test_the_scales_of_a_path_are_multiplied_on_it():
    """In the trunk on both paths, 3 outputs; in the short way 2."""
    model = fork()
    for layer in (model.trunk, model.near):
        scale = Affine(-127, 127, tuple(layer.weight.shape), torch.tensor([0.3]))
        parametrize.register_parametrization(layer, "weight", AffineQuantizer(scale), unsafe=True)
    report = micronet_eval.score(model, EXAMPLE, shares=SHARES)
    assert sum(layer.mults for layer in report.layers if layer.op == "micronet.scale") == 3 + 0.25 * 2


def test_every_example_takes_its_own_path():
    model = fork()
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    leaves = (model.trunk(x)[:, 0] > 0).tolist()
    assert 5 < sum(leaves) < 27
    answers = model(x)
    assert model.taken == ["short" if leave else "long" for leave in leaves]
    expected = torch.where(torch.tensor(leaves)[:, None], model.near(model.trunk(x)), model.far(model.trunk(x)))
    torch.testing.assert_close(answers, expected)


class Experts(Conditional):
    paths = ("a", "b", "c")

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def run(self, x):
        gate = x[:, 0]
        if self.takes("a", gate < 1):
            return self.experts[0](x)
        if self.takes("b", gate < 2):
            return self.experts[1](x)
        return self.experts[2](x)


def test_a_mixture_of_experts():
    model = Experts().eval()
    x = torch.tensor([[2.5, 1], [0.5, 1], [1.5, 1], [0.0, 1], [2.0, 1]])
    answers = model(x)
    assert model.taken == ["c", "a", "b", "a", "c"]
    chosen = zip((2, 0, 1, 0, 2), x, strict=True)
    torch.testing.assert_close(answers, torch.stack([model.experts[i](row) for i, row in chosen]))
    report = micronet_eval.score(model, x[:1], shares={"a": 0.4, "b": 0.2, "c": 0.4})
    assert [path.adds for path in report.paths] == [4 + 1, 4 + 2, 4 + 2]  # the first expert needs one comparison
    assert report.storage.parameters == 18


def test_tracing_leaves_the_model_as_it_was():
    model = fork()
    assert {op.path for op in trace(model, EXAMPLE).ops} == {"short", "long"}
    assert model.only is None
    with taking(model, "long"):
        torch.testing.assert_close(model(torch.ones(3, 4)), model.far(model.trunk(torch.ones(3, 4))))


@pytest.mark.parametrize("share", [float("nan"), float("inf")])
def test_shares_that_are_no_numbers(share):
    with pytest.raises(InputError, match="must be numbers from 0 to 1"):
        micronet_eval.score(fork(), EXAMPLE, shares={"short": share, "long": 0.5})


# --- compressed -------------------------------------------------------------------------------------------------------


def test_a_path_that_no_calibration_data_take_is_left_or_told():
    from torch.utils.data import DataLoader, TensorDataset

    from micronet_eval.strategy import Context
    from micronet_plugins.channels import HRank
    from micronet_plugins.gptq import hessians

    class Never(Conditional):
        paths = ("short", "long")

        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
            self.near = nn.Linear(4, 2)
            self.far = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 2))

        def run(self, x):
            x = self.trunk(x)
            answer = self.near(x.mean((2, 3)))
            return answer if self.takes("short", x.flatten(1)[:, 0] > -torch.inf) else self.far(x)

    model, x = Never().eval(), torch.randn(8, 1, 8, 8)
    data = DataLoader(TensorDataset(x, torch.zeros(8, dtype=torch.int64)), 8)
    made = HRank(ratio=0.05, limit=0.9).apply(model, Context(x[:1], data, 0, FORMULAS))
    assert made.far[0].weight.shape == (8, 4, 3, 3)
    assert made.trunk[0].weight.shape[0] < 8
    with pytest.raises(InputError, match="gptq: behind quantized layers no calibration data reach a layer"):
        hessians(model, [model.far[0]], [x])


# --- merged -----------------------------------------------------------------------------------------------------------


class Normed(Conditional):
    """One norm behind the same layer on both paths, one behind two different layers."""

    paths = ("short", "long")

    def __init__(self):
        super().__init__()
        self.trunk, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.one, self.two, self.shared = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        for norm in (self.norm, self.shared):
            nn.init.uniform_(norm.weight, 0.5, 2)
            norm.running_mean.normal_()

    def run(self, x):
        x = self.norm(self.trunk(x))
        if self.takes("short", x[:, 0] > 0):
            return self.shared(self.one(x))
        return self.shared(self.two(x))


def test_batch_norm_merges_where_all_paths_agree():
    torch.manual_seed(0)
    model = Normed().eval()
    result = merged(model, EXAMPLE)
    assert isinstance(result.norm, nn.Identity)
    assert isinstance(result.shared, ScaleShift)
    x = torch.randn(16, 4)
    torch.testing.assert_close(result(x), model(x), atol=1e-5, rtol=1e-5)
    assert result.taken == model.taken and len(set(model.taken)) == 2


# --- submissions ------------------------------------------------------------------------------------------------------


class Hasty(Conditional):
    """An early exit on the digits."""

    paths = ("exit", "full")

    def __init__(self):
        super().__init__()
        self.start = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.exit = nn.Sequential(nn.Flatten(), nn.Linear(128, 10))
        self.rest = nn.Sequential(
            nn.Conv2d(8, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
        )

    def run(self, x):
        x = self.start(x)
        answer = self.exit(x)
        if self.takes("exit", answer.softmax(1).amax(1) >= 0.9):
            return answer
        return self.rest(x)


MANIFEST = """
name = "hasty"
task = "digits"
authors = ["test"]
[architecture]
name = "hasty"
"""


@pytest.fixture
def described(register, tmp_path):
    """A folder with a manifest for Hasty, with so much more text."""
    register(architectures={"hasty": Hasty, "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))})

    def described(more="", manifest=MANIFEST):
        folder = tmp_path / "described"
        folder.mkdir(exist_ok=True)
        (folder / "submission.toml").write_text(manifest + more)
        return folder

    return described


@pytest.fixture
def made(described, tmp_path, run):
    """A submission of Hasty with the weights of `model`, untrained by default."""

    def made(more="", model=None, manifest=MANIFEST):
        torch.manual_seed(0)
        folder = described(more, manifest)
        model = model or micronet_eval.submission.build(
            micronet_eval.submission.read_manifest(folder).architecture, folder, weights=True
        )
        save_file(model.state_dict(), tmp_path / "state.safetensors")
        status, _, err = run("import", folder, tmp_path / "state.safetensors", "-o", tmp_path / "made")
        assert (status, err) == (0, "")
        return tmp_path / "made"

    return made


def trained(epochs=15):
    torch.manual_seed(0)
    model = Hasty()
    images, labels = digits(None, "train").tensors
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            losses = []
            for path in model.paths:
                with taking(model, path):
                    losses.append(nn.functional.cross_entropy(model(images[rows]), labels[rows]))
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.rule("math.paths")
def test_an_early_exit_on_the_digits_with_measured_shares(made):
    model = trained()
    report = micronet_eval.evaluate(made("[paths]\nexit = 0.5\nfull = 0.5\n", model))
    images, labels = digits(None, "test").tensors
    with torch.no_grad():
        early = model.exit(model.start(images))
        leave = early.softmax(1).amax(1) >= 0.9
        answers = torch.where(leave[:, None], early, model.rest(model.start(images)))
    left = int(leave.sum())
    assert 100 < left < 449
    exit, full = report.paths
    assert (exit.share, exit.measured, full.share, full.measured) == (left / 449, True, (449 - left) / 449, True)
    assert report.quality.measured == int((answers.argmax(1) == labels).sum()) / 449 > 0.95
    # start: conv 72 x 16, ReLU; exit: linear, softmax; rest: conv 1152 x 16, ReLU, linear
    assert exit.mults == 72 * 16 + 128 + 1280 + 20
    assert full.mults == exit.mults + 1152 * 16 + 256 + 2560
    assert report.math.mults == pytest.approx(exit.mults + (449 - left) / 449 * (1152 * 16 + 256 + 2560), rel=1e-12)
    assert report.storage.parameters == 72 + 8 + 1290 + 1152 + 16 + 2570
    text = json.loads(report.to_json())
    jsonschema.validate(text, SCHEMA)
    assert set(text["paths"][0]) == {"name", "share", "measured", "mults", "adds", "ops32"}


def test_claimed_shares_are_used_and_marked_where_there_is_no_data(made, run, monkeypatch, tmp_path):
    def no_data(root, split):
        from micronet_eval.task import DataMissing

        raise DataMissing("nobody has it")

    monkeypatch.setattr(micronet_eval.submission, "plugins", _tasks_without_data(no_data))
    folder = made("[paths]\nexit = 0.25\nfull = 0.75\n")
    report = micronet_eval.evaluate(folder)
    assert [(path.share, path.measured) for path in report.paths] == [(0.25, False), (0.75, False)]
    assert report.math.mults == 0.25 * report.paths[0].mults + 0.75 * report.paths[1].mults
    status, out, _ = run(folder)
    assert status == 0
    assert "25.00% of the examples (claimed, not measured)" in " ".join(out.split())
    status, out, err = run(made())
    assert (status, out) == (2, "")
    assert err == (
        f"micronet-eval: {tmp_path}/made/submission.toml: field 'paths': the share of the test set that takes each "
        "path cannot be measured (nobody has it); claim it in a table [paths] with: exit, full\n"
    )


def _tasks_without_data(dataset):
    """The plugins, but that every task lacks its data."""
    from dataclasses import replace
    from types import SimpleNamespace

    from micronet_eval import plugins

    def lookup(kind, name):
        thing = plugins.lookup(kind, name)
        return replace(thing, dataset=dataset) if kind == "task" else thing

    return SimpleNamespace(**{**vars(plugins), "lookup": lookup})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("exit = 0.5\nfull = 0.6", "must sum to 1, none of them negative: exit = 0.5, full = 0.6"),
        ("exit = 1.0", "shares are given of exit, but the model takes: exit, full"),
        ("exit = 0.5\nrest = 0.5", "shares are given of exit, rest, but the model takes: exit, full"),
        ("exit = 1.5\nfull = -0.5", "field 'paths.exit': Input should be less than or equal to 1"),
        ("exit = true\nfull = 0.0", "field 'paths.exit'"),
    ],
)
def test_wrong_shares_are_refused(made, described, run, table, message):
    folder = made()
    (folder / "submission.toml").write_text(f"{MANIFEST}[paths]\n{table}\n")
    status, out, err = run(folder)
    assert (status, out) == (2, "")
    assert f"{folder}/submission.toml" in err and "paths" in err
    assert message in err


def test_shares_of_a_model_with_one_path_are_refused(made, run):
    manifest = MANIFEST.replace('[architecture]\nname = "hasty"', '[architecture]\nname = "linear"')
    status, _, err = run(made("[paths]\nexit = 1.0\n", manifest=manifest))
    assert status == 2
    assert "field 'paths': shares are given of exit, but the model has only one path" in err


class Quantized(Hasty):
    """8-bit activations into the exit and the rest, by the architecture's own quantizer."""

    def __init__(self):
        super().__init__()
        self.narrow = FixedPointQuantizer(8, -5)

    def run(self, x):
        x = self.narrow(self.start(x))
        answer = self.exit(x)
        return answer if self.takes("exit", answer.amax(1) >= 1) else self.rest(x)


def test_a_conditional_model_with_quantizers_of_its_own():
    torch.manual_seed(0)
    example = torch.zeros(1, 1, 8, 8)
    model = merged(Quantized().eval(), example)
    parametrize.register_parametrization(model.exit[1], "weight", FixedPointQuantizer(8, -7))
    packed = packing.pack(model, Quantized(), example)
    again = packing.unpack(packed, Quantized()).eval()
    x = torch.rand(64, 1, 8, 8) * 4
    assert torch.equal(again(x), model(x))
    assert again.taken == model.taken
    report = micronet_eval.score(again, example, shares={"exit": 0.5, "full": 0.5})
    assert not report.freebie
    (exit,) = [layer for layer in report.layers if layer.module == "exit.1"]
    nonzero = int(model.exit[1].weight.count_nonzero())  # some round to zero
    assert (exit.input_bits, exit.weight_bits, exit.ops32) == (8, 8, nonzero * 8 / 32 + nonzero)
    assert report.storage.overhead_bits == 8 + 8  # both exponents, each once


def test_quantizers_cannot_be_set_into_a_conditional_model(described, run, tmp_path):
    described()
    (tmp_path / "recipe.toml").write_text(
        'task = "digits"\ndata = "noise"\n[architecture]\nname = "hasty"\n[[stages]]\nquantizer = "fixed-point"\n'
        '[submission]\nname = "hasty"\nauthors = ["test"]\n'
    )
    status, _, err = run("compress", tmp_path / "recipe.toml", "-o", tmp_path / "out")
    assert status == 2
    assert "fixed-point: activation quantizers cannot be set into a model with several paths; use Fixed" in err


def test_a_recipe_writes_the_shares_that_it_claims(described, run, tmp_path):
    described()
    (tmp_path / "recipe.toml").write_text(
        'task = "digits"\ndata = "noise"\n[architecture]\nname = "hasty"\n[[stages]]\nmerge = "batch-norm"\n'
        '[submission]\nname = "hasty"\nauthors = ["test"]\n[submission.paths]\nexit = 0.25\nfull = 0.75\n'
    )
    status, _, err = run("compress", tmp_path / "recipe.toml", "-o", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "[paths]\nexit = 0.25\nfull = 0.75" in (tmp_path / "out" / "submission.toml").read_text()
    # Before shares are known, a stage counts as its costliest path: conv and ReLU, exit and softmax, then the rest.
    steps = micronet_eval.submission.read_manifest(tmp_path / "out").provenance.steps
    assert steps[-1].mults == 72 * 16 + 128 + 1280 + 20 + 1152 * 16 + 256 + 2560


# --- what an author gets wrong ----------------------------------------------------------------------------------------


def test_a_conditional_model_without_shares_is_one_message():
    with pytest.raises(InputError, match=r"give the share of the examples on each path .*: short, long"):
        micronet_eval.score(fork(), EXAMPLE)


def test_shares_on_the_command_line(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "forks", type(sys)("forks"))
    sys.modules["forks"].fork = fork
    words = ("count", "forks:fork", "--input", "1x4", "--format", "json")
    status, out, _ = run(*words, "--path", "short=0.25", "--path", "long=0.75")
    assert status == 0
    assert json.loads(out)["math"]["mults"] == 0.25 * 18 + 0.75 * 37
    status, _, err = run(*words, "--path", "short")
    assert (status, err) == (2, "micronet-eval: --path 'short' is no path and share; write it like exit=0.3\n")


def test_a_path_that_is_not_declared():
    class Wrong(Fork):
        paths = ("brief", "long")

    with pytest.raises(InputError, match="Wrong takes path 'short', but declares only: brief, long"):
        micronet_eval.score(Wrong(), EXAMPLE, shares={"brief": 0.5, "long": 0.5})


def test_a_path_that_nobody_can_take():
    class Wrong(Fork):
        paths = ("short", "middle", "long")

    with pytest.raises(InputError, match="Wrong declares the path 'middle', but no example can take it"):
        micronet_eval.score(Wrong(), EXAMPLE, shares={"short": 0.5, "middle": 0.25, "long": 0.25})


@pytest.mark.parametrize("paths", [(), ("short",), ("long", "long")])
def test_fewer_than_two_paths(paths):
    class Wrong(Fork):
        pass

    Wrong.paths = paths
    with pytest.raises(InputError, match="Wrong needs at least two paths"):
        micronet_eval.score(Wrong(), EXAMPLE, shares={"long": 1})


class Twice(Fork):
    def run(self, x):
        x = self.trunk(x)
        if self.takes("short", x[:, 0] > 1):
            return self.near(x)
        return self.near(x) if self.takes("short", x[:, 0] > 0) else self.far(x)


class EndsOnTheLast(Fork):
    def run(self, x):
        x = self.trunk(x)
        return self.near(x) if self.takes("long", x[:, 0] > 0) else self.far(x)


@pytest.mark.parametrize(("wrong", "path"), [(Twice, "short"), (EndsOnTheLast, "long")])
def test_two_exits_on_one_path(wrong, path):
    message = f"{wrong.__name__} has two places at which examples leave on path '{path}'.*; give each exit a path"
    with pytest.raises(InputError, match=message):
        micronet_eval.score(wrong(), EXAMPLE, shares=SHARES)
    with pytest.raises(InputError, match=message):
        wrong()(torch.randn(64, 4))


def test_a_decision_is_one_bool_an_example():
    class Wrong(Fork):
        def run(self, x):
            return self.near(self.trunk(x)) if self.takes("short", x > 0) else self.far(self.trunk(x))

    with pytest.raises(InputError, match=r"Wrong: takes\('short', ...\) needs one bool an example"):
        micronet_eval.score(Wrong(), EXAMPLE, shares=SHARES)


def test_two_conditional_parts():
    with pytest.raises(InputError, match="several conditional parts"):
        micronet_eval.score(nn.Sequential(fork(), fork()), EXAMPLE)
