"""A folder of static pages: their templates and assets, and that it appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from micronet_eval.errors import InputError
from micronet_eval.task import METRICS

GENERATOR = "micronet-eval"
ASSETS = ("style.css", "site.js")


def check(folder: Path) -> None:
    """Raises InputError where a folder holds anything but such pages, or is none that could be written."""
    place = _place(folder)
    here = Path.cwd()
    if place in (here, *here.parents):
        raise InputError(f"{folder} is where you are, and is replaced as a whole; name another folder by --html")
    try:
        if place.exists() and not _is_site(place):
            raise InputError(f"{folder} exists and holds no pages of this program; name another folder by --html")
        with tempfile.TemporaryDirectory(dir=next(parent for parent in place.parents if parent.exists())):
            pass  # so there can be another one
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; name another folder by --html") from error


def _place(folder: Path) -> Path:
    """Where a folder really is: a link to it stays."""
    return Path(os.path.realpath(folder))


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder with the assets in it, to write pages to, that takes the place of `folder` when all went well.

    One that holds such pages already is replaced. Raises InputError where it holds anything else, or cannot be written.
    """
    check(folder)
    place = _place(folder)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            for name in ASSETS:
                (made / name).write_bytes((files("micronet_eval.pages") / name).read_bytes())
            yield made
            if place.exists():
                place.replace(Path(temporary) / "before")
            made.replace(place)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; name another folder by --html") from error


def _is_site(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    index = folder / "index.html"
    return index.is_file() and f'<meta name="generator" content="{GENERATOR}">' in index.read_text("utf-8", "replace")


def templates() -> Environment:
    """The templates of this package; what they are given is text, never markup."""
    found = Environment(
        loader=PackageLoader("micronet_eval.pages", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["generator"] = GENERATOR
    found.filters["quality"] = lambda value, metric: METRICS[metric].show(value) if metric else f"{value:.4g}"
    found.filters["count"] = lambda value: f"{value:,.0f}"
    return found
