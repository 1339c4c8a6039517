"""`micronet-eval new` writes packages that are complete: what is in them works, and holds what a strategy must hold."""

import importlib
import sys

import pytest

from micronet_eval import plugins
from micronet_eval.testing import checks

KINDS = ("pruner", "sparsifier", "quantizer")


@pytest.fixture
def package(run, tmp_path, monkeypatch):
    """Writes a package and imports it from where it is."""

    def package(kind):
        code, out, _ = run("new", kind, f"my-{kind}", "-o", tmp_path / kind)
        assert code == 0
        assert "pip install" in out
        monkeypatch.syspath_prepend(tmp_path / kind)
        for name in [name for name in sys.modules if name.startswith(f"my_{kind}")]:
            monkeypatch.delitem(sys.modules, name)
        return importlib.import_module(f"my_{kind}")

    yield package
    for name in [name for name in sys.modules if name.startswith(tuple(f"my_{kind}" for kind in KINDS))]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_strategy_of_a_new_package_holds_what_it_must(kind, package, tmp_path):
    module = package(kind)
    plugins.manager().register(module, f"my-{kind}")
    try:
        strategy = plugins.lookup(kind, f"my-{kind}")
    finally:
        plugins.manager().unregister(module)
    for _, check in checks(strategy):
        check()
    written = {str(p.relative_to(tmp_path / kind)) for p in (tmp_path / kind).rglob("*") if p.suffix != ".pyc"}
    assert {"pyproject.toml", "README.md", f"my_{kind}/strategy.py", f"tests/test_my_{kind}.py"} <= written
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("tmp")]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_template_is_left(kind, package, tmp_path):
    package(kind)
    for path in (tmp_path / kind).rglob("*.*"):
        if path.suffix in (".py", ".toml", ".md"):
            text = path.read_text()
            assert not {"$kind", "$name", "$module", "$class_", "$$"} & set(text.split())
            if path.suffix == ".py":
                compile(text, str(path), "exec")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Mine", "small letters"),
        ("my_pruner", "small letters"),
        ("../mine", "small letters"),
        ("class", "small letters"),
        ("low-rank", "there is a pruner 'low-rank' already"),
        ("torch", "would hide Python's or another's module 'torch'"),
        ("dataclasses", "would hide"),
    ],
)
def test_a_name_that_cannot_be(run, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("new", "pruner", name)
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_stays(run, tmp_path):
    (tmp_path / "mine").mkdir()
    code, _, err = run("new", "pruner", "mine", "-o", tmp_path / "mine")
    assert code == 2
    assert "exists already" in err
