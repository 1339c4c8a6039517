"""One small valid submission, made once by the real recipe; the command in this process; plugins for one test."""

import shutil
import sys

import pytest

SMALL = """
[submission]
name = "small"
authors = ["test"]
[architecture]
name = "wide-resnet"
depth = 10
width = 1
classes = 10
channels = 1
"""
RECIPE = (
    f'task = "digits"\ndata = "noise"{SMALL}'
    + """[[stages]]
pruner = "low-rank"
parameters = 40_000
[[stages]]
statistics = { batches = 1 }
[[stages]]
sparsifier = "magnitude"
sparsity = 0.5
[[stages]]
merge = "batch-norm"
[[stages]]
quantizer = "fixed-point"
"""
)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    from micronet_eval.recipe import compress

    folder = tmp_path_factory.mktemp("made")
    (folder / "recipe.toml").write_text(RECIPE)
    compress(folder / "recipe.toml", folder / "small")
    return folder / "small"


@pytest.fixture
def submission(made, tmp_path):
    """A copy that the test may damage."""
    return shutil.copytree(made, tmp_path / "small")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; gives exit status, standard output and standard error."""
    from micronet_eval import cli

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["micronet-eval", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def register():
    """Registers plugins for the length of one test: register(tasks={"mine": task}) calls the hook of tasks so."""
    from micronet_eval.hookspecs import hookimpl
    from micronet_eval.plugins import manager

    added = []

    def register(name=None, **things):
        plugin = type("Plugin", (), {})()
        for kind, named in things.items():

            def hook(register, named=named):
                for key, thing in named.items():
                    register(key, thing)

            setattr(plugin, f"micronet_register_{kind}", hookimpl(hook))
        manager().register(plugin, name)
        added.append(plugin)

    yield register
    for plugin in added:
        manager().unregister(plugin)


@pytest.fixture
def guarded(register):
    """Registers the task `guarded`: digits, whose test data must not be asked for."""
    from dataclasses import replace

    from micronet_eval.plugins import lookup

    digits = lookup("task", "digits")

    def dataset(root, split):
        assert split == "train", "test data were asked for"
        return digits.dataset(root, split)

    register(tasks={"guarded": replace(digits, name="guarded", dataset=dataset)})
