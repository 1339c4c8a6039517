"""Commands that make something: submissions, policies, plugins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from micronet_eval import plugins
from micronet_eval.cli.group import FAILED, cli
from micronet_eval.cli.options import isolated, with_data
from micronet_eval.cli.showing import progress_bar, training_log
from micronet_eval.errors import InputError, printable
from micronet_eval.isolation import Isolation

_recipe = click.argument("recipe", type=click.Path(path_type=Path))
_output = click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
_resume = click.option(
    "--resume", is_flag=True, help="Go on where a run of the same recipe into the same folder ended."
)


@cli.command()
@_recipe
@_output
@_resume
@with_data
def compress(recipe: Path, output: Path, resume: bool, data: Path | None) -> None:
    """Run a recipe and write the submission that comes out of it."""
    from micronet_eval.recipe import compress

    _run_recipe(compress, recipe, output, resume, data)


@cli.command()
@_recipe
@_output
@_resume
@with_data
def train(recipe: Path, output: Path, resume: bool, data: Path | None) -> None:
    """Run a recipe that only trains; write weights that recipes can start from, and the submission they are.

    It takes a GPU where there is one; `accelerate launch -m micronet_eval train ...` takes several.
    """
    from micronet_eval.recipe import train_only

    _run_recipe(train_only, recipe, output, resume, data)


def _run_recipe(run: Callable[..., None], recipe: Path, output: Path, resume: bool, data: Path | None) -> None:
    from micronet_eval.parallel import team

    with training_log() as (log, progress):
        run(recipe, output, data, log, resume, progress)
    if team().first:
        click.echo(f"wrote {output}")


@cli.command()
@_recipe
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File to write the policy to.")
@click.option("--folds", type=click.IntRange(min=2), default=5, show_default=True, help="Networks to train.")
@click.option("--trials", type=click.IntRange(min=1), default=100, show_default=True, help="Policies to try a fold.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many of them are taken.")
@click.option(
    "--examples", type=click.IntRange(min=1), default=2000, show_default=True, help="Examples to try them on."
)
@with_data
def augment(recipe: Path, output: Path, folds: int, trials: int, top: int, examples: int, data: Path | None) -> None:
    """Search a policy of augmentations for a recipe's network and training data, by Fast AutoAugment.

    Training that says augment = "OUTPUT" applies it.
    """
    import tomli_w

    from micronet_eval.files import is_below_a_folder, write_whole
    from micronet_eval.parallel import team
    from micronet_eval.policy_search import Search, search

    if output.is_dir() or not is_below_a_folder(output.absolute().parent):
        raise InputError(f"{output} is a folder, or a part of its path is a file; name another file")
    how = Search(folds=folds, trials=trials, top=top, examples=examples)
    with training_log() as (log, progress):
        policy = search(recipe, how, data, log if team().first else lambda line: None, progress)
    if not team().first:
        return
    try:
        write_whole(output, tomli_w.dumps(policy.model_dump()).encode())
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}; name another file") from error
    click.echo(f"wrote {output}: {len(policy.sub_policies)} sub-policies")


@cli.command()
@click.argument("kind", type=click.Choice(plugins.STRATEGIES))
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write; by default NAME.")
def new(kind: plugins.Kind, name: str, output: Path | None) -> None:
    """Write a plugin package to begin with: one strategy, its tests, ready to pip install."""
    from micronet_eval.new import new_plugin

    folder = output or Path(name)
    new_plugin(kind, name, folder)
    steps = (f"pip install -e '{folder}[test]'", f"micronet-eval strategies {name}", f"python -m pytest {folder}")
    click.echo(f"wrote {folder}; next: {', '.join(steps)}")


@cli.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("state_dict", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@isolated
def import_(folder: Path, state_dict: Path, output: Path, isolation: Isolation) -> None:
    """Make a submission of the weights in STATE_DICT (safetensors or torch.save) and the submission.toml in FOLDER."""
    from micronet_eval.importing import import_weights

    import_weights(folder, state_dict, output, isolation)
    click.echo(f"wrote {output}")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@with_data
def reproduce(folder: Path, data: Path | None) -> None:
    """Run a submission's recipe again and compare the weights bit for bit; exit status 1 where they differ."""
    from micronet_eval.reproducing import reproduce

    with progress_bar("training, at most") as progress:
        found = reproduce(folder, data, click.echo, progress or (lambda done, total: None))
    told = [*found.remarks, *(f"{name}: only one of the two has it, or with this shape" for name in found.others)]
    told += [
        f"{d.tensor}: {d.values:,} of {d.of:,} values differ, by {d.largest:.3g} at most" for d in found.differences
    ]
    for line in told:
        click.echo(printable(line))
    click.echo("the weights are the same, bit for bit" if found.identical else "the weights differ")
    sys.exit(0 if found.identical else FAILED)
