"""The command `micronet-eval`, which other modules add commands to, and its exit statuses."""

from __future__ import annotations

import difflib
import os

import click
from click_default_group import DefaultGroup

from micronet_eval.errors import InputError, message
from micronet_eval.plugins import unknown

FAILED, BAD_INPUT, BROKEN = 1, 2, 3


class _Commands(DefaultGroup):
    """Commands of which one may be left out, and none is mistyped for a folder."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's. Raises InputError where the first word is no command but near one, and nothing has that name."""
        word = args[0]
        if word not in self.commands and not os.path.lexists(word) and difflib.get_close_matches(word, self.commands):
            raise InputError(unknown("command", word, self.commands))
        found: tuple[str | None, click.Command | None, list[str]] = super().resolve_command(ctx, args)
        return found


@click.group(cls=_Commands, default="evaluate", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="micronet-eval")
def cli() -> None:
    """What a compressed neural network really costs, by the rules of the MicroNet Challenge.

    micronet-eval FOLDER... evaluates submissions.
    """


def complain(error: Exception) -> int:
    """Tells an error in one line; gives the exit status that it means."""
    click.echo(message(f"micronet-eval: {error}"), err=True)
    return BAD_INPUT if isinstance(error, InputError) else BROKEN
