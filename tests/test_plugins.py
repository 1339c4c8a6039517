"""Plugins: found by their entry points only, each name once, and whatever they break is one message."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace as changed
from importlib.metadata import entry_points, version
from pathlib import Path

import click
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from micronet_eval import cli, evaluate, plugins, score
from micronet_eval.costs import Cost, elementwise
from micronet_eval.errors import InputError
from micronet_eval.hookspecs import hookimpl
from micronet_eval.recipe import compress
from micronet_eval.strategy import Pruner, Quantizer, Sparsifier
from micronet_eval.structure import Mask, replace
from micronet_eval.submission import read_manifest

CORE = Path(plugins.__file__).parent
COMMAND = Path(sys.executable).with_name("micronet-eval")
KINDS = ("pruner", "sparsifier", "quantizer", "task", "architecture", "cost")


class Narrow(Pruner):
    """Makes the hidden layer narrower."""

    width: int = 4

    def apply(self, model, context):
        model = copy.deepcopy(model)
        replace(model, "1", nn.Linear(64, self.width))
        replace(model, "3", nn.Linear(self.width, 10))
        return model


class EveryOther(Sparsifier):
    """Zeros every other weight."""

    def apply(self, model, context):
        model = copy.deepcopy(model)
        for layer in (model[1], model[3]):
            mask = (torch.arange(layer.weight.numel()) % 2).view_as(layer.weight)
            nn.utils.parametrize.register_parametrization(layer, "weight", Mask(mask))
        return model


class Nothing(Quantizer):
    """Quantizes nothing."""

    def apply(self, model, context):
        return copy.deepcopy(model)


def two_layers(width=16):
    """One hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


class Sine(nn.Module):
    def forward(self, x):
        return torch.special.i0(x)


@pytest.fixture
def package(tmp_path):
    """Installs a package with a plugin where a subprocess finds it; gives a function that runs the command there."""

    def package(text, name="stranger"):
        (tmp_path / f"{name}.py").write_text(text)
        about = tmp_path / f"{name}_dist-1.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.2\n")
        (about / "entry_points.txt").write_text(f"[micronet_eval]\n{name} = {name}\n")

    def run(*words):
        path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run([COMMAND, *words], capture_output=True, text=True, env=environment)

    package.run = run
    return package


# --- where plugins come from ------------------------------------------------------------------------------------------


def test_the_bundled_plugins_have_an_entry_point_as_any_others():
    (bundled,) = (e for e in entry_points(group="micronet_eval") if e.dist.name == "micronet-eval")
    assert bundled.value == "micronet_plugins"
    assert plugins.manager().get_plugin(bundled.name).__name__ == "micronet_plugins"


def test_the_core_never_mentions_the_bundled_plugins():
    sources = list(CORE.rglob("*.py"))
    assert len(sources) > 15
    assert not [path for path in sources if "micronet_plugins" in path.read_text()]


def test_without_entry_points_nothing_is_there(monkeypatch):
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [])
    empty = plugins.manager.__wrapped__()
    monkeypatch.setattr(plugins, "manager", lambda: empty)
    assert not any(plugins.registered(kind) for kind in KINDS)
    with pytest.raises(InputError, match=r"unknown task 'digits'; none is known$"):
        plugins.lookup("task", "digits")


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_package_of_what_is_bundled(kind):
    found = plugins.registered(kind)
    assert found
    assert list(found) == sorted(found)
    assert {entry.package for entry in found.values()} == {f"micronet-eval {version('micronet-eval')}"}


def test_a_strangers_package_is_found_and_named(package):
    package(
        "from micronet_eval.hookspecs import hookimpl\n"
        "@hookimpl\n"
        "def micronet_register_architectures(register):\n"
        "    def cube(side: int = 3):\n"
        "        'A cube.'\n"
        "    register('cube', cube)\n"
        "@hookimpl\n"
        "def micronet_register_commands(cli):\n"
        "    @cli.command()\n"
        "    def greet():\n"
        "        print('hello from a stranger')\n"
    )
    listed = package.run("architectures", "--format", "json")
    assert listed.stderr == ""
    (row,) = (row for row in json.loads(listed.stdout) if row["name"] == "cube")
    assert row == {"name": "cube", "options": "side=3", "is": "A cube.", "package": "stranger-dist 1.2"}
    assert package.run("greet").stdout == "hello from a stranger\n"


# --- what plugins add -------------------------------------------------------------------------------------------------


def test_strategies_task_and_architecture_of_a_plugin_are_used(register, tmp_path, run):
    asked = []

    def dataset(root, split):
        asked.append((root, split))
        return TensorDataset(torch.randn(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64))

    task = changed(plugins.lookup("task", "digits"), name="mine", dataset=dataset, threshold=0.0)
    register(
        "my-plugin",
        pruners={"narrow": Narrow},
        sparsifiers={"every-other": EveryOther},
        quantizers={"nothing": Nothing},
        tasks={"mine": task},
        architectures={"two-layers": two_layers},
    )
    assert plugins.registered("pruner")["narrow"] == plugins.Registered(Narrow, "my-plugin")
    (tmp_path / "recipe.toml").write_text(
        'task = "mine"\n[submission]\nname = "x"\nauthors = ["x"]\n[architecture]\nname = "two-layers"\nwidth = 32\n'
        '[[stages]]\npruner = "narrow"\nwidth = 6\n[[stages]]\nsparsifier = "every-other"\n'
        '[[stages]]\nquantizer = "nothing"\n'
    )
    compress(tmp_path / "recipe.toml", tmp_path / "made", tmp_path)
    assert asked == [(tmp_path, "train")]
    steps = read_manifest(tmp_path / "made").provenance.steps
    assert [step.parameters for step in steps] == [32 * 75 + 10, *[6 * 75 + 10] * 3]
    assert steps[-1].nonzeros == 6 * 74 // 2 + 16
    status, out, err = run(tmp_path / "made", "--data", tmp_path)
    assert (status, err) == (0, "")
    assert "· mine ·" in out
    assert asked[1:] == [(tmp_path, "test")]
    rows = {row["name"]: row for row in json.loads(run("strategies", "--format", "json")[1])}
    assert rows["narrow"] == {
        "name": "narrow",
        "kind": "pruner",
        "does": "Makes the hidden layer narrower.",
        "package": "my-plugin",
    }
    assert {rows["every-other"]["kind"], rows["nothing"]["kind"]} == {"sparsifier", "quantizer"}


def test_a_plugin_that_is_unregistered_leaves_nothing():
    class Plugin:
        @hookimpl
        def micronet_register_pruners(self, register):
            register("narrow", Narrow)

    plugin = Plugin()
    plugins.manager().register(plugin)
    assert "narrow" in plugins.registered("pruner")
    plugins.manager().unregister(plugin)
    assert "narrow" not in plugins.registered("pruner")


def test_a_cost_of_a_plugin(register):
    with pytest.raises(InputError, match=r"no cost formula for operation aten\.i0"):
        score(Sine(), torch.zeros(1, 5))
    register(costs={"aten.i0": elementwise(3, 2)})
    report = score(Sine(), torch.zeros(1, 5))
    assert (report.math.mults, report.math.adds) == (15, 10)
    assert report.coverage.priced == 1


def test_a_command_of_a_plugin(run):
    class Plugin:
        @hookimpl
        def micronet_register_commands(self, cli):
            @cli.command()
            @click.argument("name")
            def greet(name):
                """Says hello."""
                click.echo(f"hello {name}")

    plugin = Plugin()
    plugins.manager().register(plugin)
    try:
        assert run("greet", "you") == (0, "hello you\n", "")
        assert "Says hello." in run("--help")[1]
    finally:
        plugins.manager().unregister(plugin)
        del cli.cli.commands["greet"]


# --- what plugins break -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("pruner", "low-rank"),
        ("sparsifier", "magnitude"),
        ("quantizer", "fixed-point"),
        ("task", "digits"),
        ("architecture", "wide-resnet"),
    ],
)
def test_a_name_registered_twice_names_both_packages(register, kind, name):
    register("my-plugin", **{f"{kind}s": {name: None}})
    with pytest.raises(InputError) as error:
        plugins.registered(kind)
    ours = f"micronet-eval {version('micronet-eval')}"
    assert str(error.value).startswith(f"the {kind} '{name}' is registered by both ")
    assert "my-plugin" in str(error.value)
    assert ours in str(error.value)


def test_a_clash_is_one_message_of_the_command(run, register):
    register("my-plugin", tasks={"digits": None})
    status, out, err = run("tasks")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "the task 'digits' is registered by both" in err


def test_one_name_for_strategies_of_two_kinds(run, register):
    """A name is unique within its kind; `micronet-eval strategies NAME` shows the options of all that have it."""
    register("my-plugin", pruners={"fixed-point": Narrow})
    listed = json.loads(run("strategies", "--format", "json")[1])
    assert {row["kind"] for row in listed if row["name"] == "fixed-point"} == {"pruner", "quantizer"}
    options = json.loads(run("strategies", "fixed-point", "--format", "json")[1])
    assert {row["option"] for row in options if row["kind"] == "pruner"} == {"width"}
    assert "weight_bits" in {row["option"] for row in options if row["kind"] == "quantizer"}


def test_a_plugin_that_overrides_a_cost_of_ours(register, submission):
    register("my-plugin", costs={"aten.relu": lambda op: Cost()})
    with pytest.raises(InputError, match=r"my-plugin registers a cost for aten\.relu, which micronet-eval defines"):
        evaluate(submission)


def test_a_plugin_that_prices_what_is_free(register, submission):
    """Free operations are as much ours as priced ones."""
    register("my-plugin", costs={"aten.view": elementwise(1)})
    with pytest.raises(InputError, match=r"my-plugin registers a cost for aten\.view, which micronet-eval defines"):
        evaluate(submission)


def one_message(ended, *parts):
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("micronet-eval: ")
    assert "Traceback" not in ended.stderr
    assert all(part in ended.stderr for part in parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("import no_such_thing", ("ModuleNotFoundError", "no_such_thing")),
        ("raise ValueError('not today')", ("ValueError", "not today")),
        ("def broken(:", ("SyntaxError",)),
        (
            "from micronet_eval.hookspecs import hookimpl\n@hookimpl\ndef micronet_register_prunes(register): pass",
            ("micronet_register_prunes",),
        ),
        (
            "from micronet_eval.hookspecs import hookimpl\n@hookimpl\ndef micronet_register_pruners(add): pass",
            ("micronet_register_pruners", "add"),
        ),
    ],
    ids=["missing import", "exception", "syntax", "unknown hook", "wrong argument"],
)
def test_a_plugin_that_cannot_be_loaded(package, text, parts):
    package(text)
    one_message(package.run("tasks"), "a plugin cannot be loaded", *parts)


@pytest.mark.parametrize("fault", ["import no_such_thing", "1 / 0"])
@pytest.mark.parametrize("hook", ["micronet_register_tasks(register)", "micronet_register_commands(cli)"])
def test_a_plugin_whose_hook_fails(package, hook, fault):
    """Hooks import lazily, the bundled ones too, so a missing dependency shows only here."""
    package(f"from micronet_eval.hookspecs import hookimpl\n@hookimpl\ndef {hook}:\n    {fault}\n")
    one_message(package.run("tasks"), "stranger")
