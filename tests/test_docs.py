"""The commands and the Python code that README shows are run."""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_origin

import pytest
from rich.console import Console

from micronet_eval import evaluate
from micronet_eval.opening import check_claims
from micronet_eval.plugins import lookup
from micronet_eval.report import print_report
from micronet_eval.submission import Architecture, Manifest, Step, Table, build, read_manifest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("$ ")
]


@pytest.mark.docs
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_ends_well(command, tmp_path):
    words = [str(tmp_path / "out") if word == "/tmp/digits" else word for word in shlex.split(command)]
    assert words[0] == "micronet-eval"
    words[0] = str(Path(sys.executable).parent / "micronet-eval")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_report_of_the_readme_is_what_is_printed():
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    print_report([evaluate(ROOT / "submissions" / "digits")], console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert "```text\n" + "\n".join(lines) + "\n```" in README


@pytest.mark.docs
def test_the_python_code_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert '"submission": "3"' in done.stdout


@pytest.mark.docs
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
def test_the_notebook_runs_as_it_was_committed():
    nbformat = pytest.importorskip("nbformat")
    from docs import notebook

    committed = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    assert [cell.source for cell in committed.cells] == [cell.source for cell in notebook.notebook().cells]
    assert all(
        cell.outputs for cell in committed.cells if cell.cell_type == "code" and "tempfile" not in cell.source[:9]
    )
    for cell in notebook.executed().cells:  # an error in a cell is raised
        assert not [output for output in cell.get("outputs", []) if output.output_type == "error"]


def test_the_readme_begins_with_the_set_up_commands():
    text = README.splitlines()
    assert text[2].strip().startswith("pip install . && micronet-eval submissions/3")
    assert text[3].strip().startswith("pipx run tox")


def test_the_worked_example_of_the_format_prints_what_is_shown(tmp_path, monkeypatch, capsys):
    code, shown = re.search(
        r"## A worked example.*?```python\n(.*?)```.*?```text\n(.*?)```",
        (ROOT / "docs" / "format.md").read_text(),
        re.S,
    ).groups()
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out == re.sub(r"\n +", "", shown)
    assert (tmp_path / "tiny.safetensors").stat().st_size == 536


def fields_of(table, prefix="", needed=True):
    """The fields of a TOML table, and of tables in it, each with whether it is needed."""
    for name, field in table.model_fields.items():
        kinds = [] if get_origin(field.annotation) is list else [field.annotation, *get_args(field.annotation)]
        inside = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Table)]
        if inside:
            yield from fields_of(inside[0], f"{prefix}{name}.", needed=field.is_required())
            continue
        yield f"{prefix}{name}", "yes" if needed and field.is_required() else "no"
        if field.annotation is Architecture:
            yield from {f"{name}.name": "or `file`", f"{name}.file": "or `name`"}.items()


def test_the_fields_of_a_manifest_are_those_of_the_table():
    text = (ROOT / "docs" / "format.md").read_text().partition("## submission.toml")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z.]+)` \| [^|]+ \| ([^|]+) \|", text, re.M)
    assert rows == list(fields_of(Manifest))
    assert set(Architecture.model_fields) == {"name", "file"}
    assert all(f"`{field}`" in text for field in Step.model_fields)


def test_the_manifest_of_the_documentation_fits_its_architecture(tmp_path):
    (example,) = re.findall(r"```toml\n(name.*?)```", (ROOT / "docs" / "format.md").read_text(), re.S)
    (tmp_path / "submission.toml").write_text(example)
    manifest = read_manifest(tmp_path)
    model = build(manifest.architecture, tmp_path)
    check_claims(manifest.claims, manifest.paths, lookup("task", manifest.task), model, "")


def test_relative_links_of_the_documentation_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_example_of_the_plugin_page_is_the_one_that_can_be_installed():
    example = ROOT / "examples" / "micronet-spatial"
    blocks = re.findall(r"```(?:toml|python)\n(.*?)```", (ROOT / "docs" / "plugins.md").read_text(), re.S)
    files = ["pyproject.toml", "micronet_spatial/__init__.py", "micronet_spatial/pruner.py", "recipe.toml"]
    assert [(example / file).read_text() for file in files] == blocks[:4]
