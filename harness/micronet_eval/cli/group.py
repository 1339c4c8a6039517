"""The command `micronet-eval`, which other modules add commands to, and its exit statuses."""

from __future__ import annotations

import click
from click_default_group import DefaultGroup

from micronet_eval.errors import InputError, message

FAILED, BAD_INPUT, BROKEN = 1, 2, 3


@click.group(cls=DefaultGroup, default="evaluate", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="micronet-eval")
def cli() -> None:
    """What a compressed neural network really costs, by the rules of the MicroNet Challenge.

    micronet-eval FOLDER... evaluates submissions.
    """


def complain(error: Exception) -> int:
    """Tells an error in one line; gives the exit status that it means."""
    click.echo(message(f"micronet-eval: {error}"), err=True)
    return BAD_INPUT if isinstance(error, InputError) else BROKEN
