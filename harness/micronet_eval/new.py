"""A complete plugin package to begin with: `micronet-eval new pruner my-pruner`."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

from micronet_eval import plugins
from micronet_eval.errors import InputError


def new_plugin(kind: plugins.Kind, name: str, folder: str | Path) -> None:
    """Writes a package with the strategy `name`, its tests and its README into `folder`, which must not exist yet.

    Raises InputError where the kind is none of a strategy, the name cannot be used or the folder cannot be written.
    """
    if kind not in plugins.STRATEGIES:
        raise InputError(plugins.unknown("kind of strategy", kind, plugins.STRATEGIES))
    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(module):
        raise InputError(f"{name!r} is no name for a package; use small letters, digits and hyphens, as in my-{kind}")
    if name in (known := plugins.registered(kind)):
        raise InputError(f"there is a {kind} {name!r} already, from {known[name].package}; choose another name")
    if (installed := find_spec(module)) is not None and installed.origin is not None:
        raise InputError(f"the package would hide Python's or another's module {module!r}; choose another name")
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already; name another folder by -o")
    values = {"kind": kind, "name": name, "module": module, "class_": module.title().replace("_", "")}
    layout = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{module}/__init__.py": "__init__.py",
        f"{module}/strategy.py": f"{kind}.py",
        f"tests/test_{module}.py": "test.py",
    }
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent) as whole:
            for path, template in layout.items():
                text = (files("micronet_eval") / "templates" / f"{template}.txt").read_text(encoding="utf-8")
                (Path(whole) / "made" / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(whole) / "made" / path).write_text(Template(text).substitute(values), encoding="utf-8")
            shutil.move(Path(whole) / "made", folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; name another folder by -o") from error
