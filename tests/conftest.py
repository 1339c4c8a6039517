"""One small valid submission, made once by the real recipe, for tests that damage copies of it."""

import shutil

import pytest

RECIPE = """
task = "digits"
data = "noise"
[submission]
name = "small"
authors = ["test"]
[architecture]
name = "wide-resnet"
depth = 10
width = 1
classes = 10
channels = 1
[[stages]]
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


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    from micronet_eval.recipe import compress

    folder = tmp_path_factory.mktemp("made")
    (folder / "recipe.toml").write_text(RECIPE)
    compress(folder / "recipe.toml", folder / "small")
    return folder / "small"


@pytest.fixture
def submission(made, tmp_path):
    return shutil.copytree(made, tmp_path / "small")
