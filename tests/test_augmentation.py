"""Augmentation of whole batches, policies of torchvision's operations, and the search for them."""

import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from pydantic import ValidationError
from torch import nn
from torch.utils.data import TensorDataset

from micronet_eval.augmentation import (
    OPERATIONS,
    Augmentation,
    Operation,
    Policy,
    applier,
    augmenter,
    cropped,
    erased,
    flipped,
    operate,
)
from micronet_eval.errors import InputError
from micronet_eval.policy_search import Search, loss, loss_of, plain, ranges, search
from micronet_eval.submission import read_toml
from micronet_eval.training import Training


def images(count=64, channels=1, size=8):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


# --- crop, flip, erase ------------------------------------------------------------------------------------------------


def test_a_crop_is_a_part_of_the_padded_image():
    torch.manual_seed(0)
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    padded = torch.tensor([[0.0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 4, 0], [0, 0, 0, 0]])
    parts = {tuple(padded[i : i + 2, j : j + 2].flatten().tolist()) for i in range(3) for j in range(3)}
    made = cropped(image.expand(200, 3, 2, 2), 1)
    assert {tuple(channel.flatten().tolist()) for channel in made[:, 0]} == parts
    assert torch.equal(made[:, 0], made[:, 2])


def test_half_of_the_images_are_mirrored():
    torch.manual_seed(0)
    before = images(400)
    after = flipped(before)
    same, mirrored = ((after == other).all((1, 2, 3)) for other in (before, before.flip(-1)))
    assert (same ^ mirrored).all()
    assert 160 < mirrored.sum() < 240


def test_a_rectangle_of_some_images_becomes_noise():
    torch.manual_seed(0)
    before = images(400, channels=3, size=20) * 4 + 6
    after = erased(before, 0.25)
    changed = (after != before).any(1)
    touched = changed.any((1, 2))
    assert 70 < touched.sum() < 130
    assert torch.equal((after != before).all(1), changed)
    sides = []
    for mask in changed[touched]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()  # a rectangle, without holes
        sides.append((box.shape[0] / 20, box.shape[1] / 20))
    areas = [height * width for height, width in sides]
    assert 0.01 < min(areas) < 0.08  # 0.02 and 0.4, but for whole pixels
    assert 0.3 < max(areas) < 0.45
    assert min(h / w for h, w in sides) < 0.5
    assert max(h / w for h, w in sides) > 2
    noise = after[(after != before)]
    assert noise.mean().item() == pytest.approx(8, abs=0.2)  # of 6 ... 10, evenly
    assert noise.std().item() == pytest.approx(4 / math.sqrt(12), abs=0.1)


def test_what_are_no_images_cannot_be_augmented():
    with pytest.raises(InputError, match="crop, flip, erase and augment change images, not inputs of 1 axes"):
        augmenter(Augmentation(flip=True))(torch.zeros(2, 6))
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    assert augmenter(Augmentation())(tokens) is tokens


# --- operations and policies ------------------------------------------------------------------------------------------


def test_operations_by_hand():
    row = torch.linspace(0, 1, 20).expand(1, 1, 20, 20)
    right, left = sorted({tuple(operate("translate_x", 1.0, row)[0, 0, 0].tolist()) for _ in range(20)})
    assert left == pytest.approx([*row[0, 0, 0, 9:].tolist(), *[0.0] * 9], abs=1e-6)
    assert right == pytest.approx([*[0.0] * 9, *row[0, 0, 0, :11].tolist()], abs=1e-6)
    grey = torch.tensor([0.0, 0.5, 0.7, 0.8, 1.0]).view(1, 1, 1, 5).expand(1, 1, 5, 5)
    assert operate("invert", 0, grey)[0, 0, 0].tolist() == pytest.approx([1, 0.5, 0.3, 0.2, 0])
    assert operate("solarize", 0.25, grey)[0, 0, 0].tolist() == pytest.approx([0, 0.5, 0.7, 0.2, 0])
    assert operate("posterize", 1.0, images(size=32)).unique().numel() <= 16
    bright = {round(operate("brightness", 1.0, grey)[0, 0, 0, 1].item(), 4) for _ in range(20)}
    assert bright == {0.05, 0.95}  # 0.5 times 0.1 or 1.9
    cut = operate("cutout", 1.0, torch.zeros(8, 1, 20, 20))
    assert (cut == 0.5).sum((1, 2, 3)).tolist() == [16] * 8  # a fifth of the edge


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_keeps_the_shape_and_the_scale(name, channels):
    torch.manual_seed(0)
    for magnitude in (0.0, 0.3, 1.0):
        made = operate(name, magnitude, images(4, channels, 12))
        assert made.shape == (4, channels, 12, 12)
        assert 0 <= made.min() <= made.max() <= 1


def test_each_image_gets_one_sub_policy_in_the_scale_of_its_data():
    torch.manual_seed(0)
    inverted = [Operation(name="invert", probability=1, magnitude=0)] * 1
    nothing = [Operation(name="invert", probability=0, magnitude=0)] * 2
    policy = Policy(low=[-1.0], high=[3.0], sub_policies=[inverted, nothing])
    before = images(40) * 4 - 1
    after = applier(policy)(before)
    kept, turned = (torch.isclose(after, other, atol=1e-5).all((1, 2, 3)) for other in (before, 2 - before))
    assert (kept ^ turned).all()
    assert kept.sum() == 20


def test_a_policy_is_for_its_channels():
    policy = Policy(low=[0.0], high=[1.0], sub_policies=[[Operation(name="invert", probability=1, magnitude=0)]])
    with pytest.raises(InputError, match="the policy is for 1 channels, the images have 3"):
        applier(policy)(images(channels=3))
    with pytest.raises(ValidationError, match="low below high"):
        Policy(low=[1.0], high=[1.0], sub_policies=policy.sub_policies)


def test_the_same_random_numbers_change_the_same():
    subs = [[Operation(name=name, probability=0.5, magnitude=0.5)] * 2 for name in OPERATIONS]
    apply = applier(Policy(low=[0.0], high=[1.0], sub_policies=subs))
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(apply(images()))
    assert torch.equal(*made)
    assert not torch.equal(made[0], images())


# --- the search -------------------------------------------------------------------------------------------------------

RECIPE = (
    f'task = "guarded"\nseed = 1\nvalidation = 0.1{SMALL}'
    + """[[stages]]
train = { epochs = 2, learning_rate = 0.01, mixup = 0.2, flip = true AUGMENT }
"""
)


def test_a_policy_is_searched_without_test_data_and_training_applies_it(tmp_path, run, guarded):
    recipe, policy = tmp_path / "recipe.toml", tmp_path / "policy.toml"
    recipe.write_text(RECIPE.replace("AUGMENT", ""))
    options = ("--folds", 2, "--trials", 3, "--top", 2, "--examples", 50)
    code, out, err = run("augment", recipe, "-o", policy, *options)
    assert (code, err) == (0, "")
    assert f"wrote {policy}: 20 sub-policies" in out  # 2 folds, 2 policies, 5 each
    assert "fold 2 of 2: training on 607 examples" in out  # 1,348 without a tenth, 1,213, in two
    found = read_toml(policy, Policy)
    assert (found.low, found.high) == ([0], [1])
    assert all(len(operations) == 2 for operations in found.sub_policies)
    again = search(recipe, Search(folds=2, trials=3, top=2, examples=50))
    assert again == found
    recipe.write_text(RECIPE.replace("AUGMENT", f', augment = "{policy}"'))
    code, with_policy, _ = run("train", recipe, "-o", tmp_path / "with")
    assert code == 0
    recipe.write_text(RECIPE.replace("AUGMENT", ""))
    _, without, _ = run("train", recipe, "-o", tmp_path / "without")
    assert with_policy.splitlines()[1] != without.splitlines()[1]


def test_more_folds_than_examples_are_refused(tmp_path, guarded):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("AUGMENT", "").replace("= 0.1", "= 0.999"))
    with pytest.raises(InputError, match=r"recipe.toml: 1 training examples are fewer than 2 folds; take fewer folds"):
        search(tmp_path / "recipe.toml", Search(folds=2, trials=1, top=1))


def test_networks_of_the_search_are_trained_without_augmentation():
    training = Training(epochs=2, learning_rate=1, crop=4, flip=True, erase=0.5, augment="x", mixup=1, cutmix=1)
    assert plain(training) == Training(epochs=2, learning_rate=1)


def test_the_loss_of_a_policy_by_hand():
    class Mean(nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)), torch.zeros(len(x))], 1)

    examples = TensorDataset(torch.full((6, 1, 8, 8), 0.25), torch.zeros(6, dtype=torch.int64))
    policy = Policy(low=[0.0], high=[1.0], sub_policies=[[Operation(name="invert", probability=1, magnitude=0)]])
    before = torch.get_rng_state()
    assert loss(Mean(), examples, lambda x: x, 0) == pytest.approx(math.log(1 + math.exp(-0.25)))
    assert loss(Mean(), examples, applier(policy), 0) == pytest.approx(math.log(1 + math.exp(-0.75)))
    torch.set_rng_state(before)


def test_ranges_are_those_of_each_channel():
    pixels = torch.zeros(5, 3, 2, 2)
    pixels[4, 1, 0, 0], pixels[2, 1, 1, 1], pixels[:, 2] = 7.0, -3.0, 2.0
    assert ranges(TensorDataset(pixels, torch.zeros(5))) == ([0, -3, 2], [1, 7, 3])


def test_the_search_needs_optuna_and_a_file_to_write(tmp_path, monkeypatch, run, guarded):
    """What is told before the first network is trained."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("AUGMENT", ""))
    for output in (tmp_path, recipe / "policy.toml"):
        code, out, err = run("augment", recipe, "-o", output)
        assert (code, out) == (2, "")
        assert f"{output} is a folder, or a part of its path is a file; name another file" in err
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, out, err = run("augment", recipe, "-o", tmp_path / "policy.toml")
    assert (code, out) == (2, "")
    assert "pip install 'micronet-eval[train]'" in err


def test_a_network_of_the_search_that_diverges_is_one_clear_message(tmp_path, monkeypatch, run, guarded):
    """Whether the last step alone does it, or one before."""
    recipe = tmp_path / "recipe.toml"
    for rate in ("1e20", "0.01"):
        recipe.write_text(RECIPE.replace("AUGMENT", ', optimizer = "sgd"').replace("0.01", rate))
        code, _, err = run("augment", recipe, "-o", tmp_path / "policy.toml", "--folds", 2)
        assert (code, err.count("\n")) == (2, 1)
        assert re.search(rf"{recipe}: train: the .*loss of .* is (nan|inf); take a smaller learning_rate", err)
        monkeypatch.setattr("micronet_eval.policy_search.train", lambda model, *words, **options: spoilt(model))


def spoilt(model):
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)


def test_a_policy_of_which_the_loss_is_no_number_is_the_last():
    losses = [None, math.inf, 0.0, 2.0]
    ranked = sorted((SimpleNamespace(value=value) for value in losses), key=loss_of)
    assert [trial.value for trial in ranked[:2]] == [0.0, 2.0]


def test_what_has_no_training_has_no_policy(tmp_path, run, guarded):
    text = RECIPE.replace(
        "train = { epochs = 2, learning_rate = 0.01, mixup = 0.2, flip = true AUGMENT }", 'merge = "batch-norm"'
    )
    (tmp_path / "recipe.toml").write_text(text)
    code, _, err = run("augment", tmp_path / "recipe.toml", "-o", tmp_path / "policy.toml")
    assert code == 2
    assert "a policy is searched for a recipe that trains on images" in err
    code, _, err = run("train", tmp_path / "recipe.toml", "-o", tmp_path / "out")
    assert code == 2
    assert "field 'stages.0': merge batch-norm does not train; micronet-eval compress runs it" in err
