"""`python -m micronet_eval` is the command `micronet-eval`."""

from micronet_eval.cli import command

command()
