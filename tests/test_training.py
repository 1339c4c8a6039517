"""Training: schedules, mixing, distillation, regularisation by hand; rounds of a recipe; resuming."""

import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

from micronet_eval import evaluate, plugins
from micronet_eval.conditional import Conditional
from micronet_eval.errors import InputError
from micronet_eval.kept import KEPT
from micronet_eval.recipe import Recipe, Target, compress, named_stages, strategy_of
from micronet_eval.strategy import Context
from micronet_eval.structure import Mask
from micronet_eval.submission import Step, read_manifest, read_toml
from micronet_eval.training import (
    Distillation,
    Training,
    Views,
    distillation,
    loader,
    mix,
    orthonormality,
    rate,
    train,
)


def context(seed=0, examples=24):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(examples, 6, generator=generator), torch.arange(examples) % 3
    return Context(torch.zeros(1, 6), loader(TensorDataset(inputs, labels), 4, seed), seed, plugins.formulas())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


# --- one step by hand -------------------------------------------------------------------------------------------------


def test_schedules():
    def rates(**options):
        share = rate(Training(learning_rate=1, **options), batches=2)
        return [share(step) for step in range(2 * options["epochs"])]

    assert rates(epochs=2) == pytest.approx([1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2])
    assert rates(epochs=4, schedule="step") == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(epochs=2, schedule="constant") == [1, 1, 1, 1]
    assert rates(epochs=3, schedule="constant", warmup=1) == [0.5, 1, 1, 1, 1, 1]


def test_mixup_and_cutmix_keep_what_they_say():
    torch.manual_seed(0)
    inputs = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 10, 10)
    for options in ({"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 0.5}):
        training = Training(epochs=1, learning_rate=1, **options)
        for _ in range(20):
            mixed, other, share = mix(inputs, training)
            expected = share * inputs.mean((1, 2, 3)) + (1 - share) * inputs[other].mean((1, 2, 3))
            assert torch.allclose(mixed.mean((1, 2, 3)), expected, atol=1e-5)
            assert 0 <= share <= 1
    unmixed, _, share = mix(inputs, Training(epochs=1, learning_rate=1))
    assert unmixed is inputs
    assert share == 1


def test_distillation_by_hand():
    how = Distillation(weight=0.25, temperature=2)
    own, given = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])
    # The teacher's softmax at temperature 2 is 3/4 and 1/4, its own 1/2 and 1/2.
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation(own, given, how).item() == pytest.approx(0.25 * 4 * divergence)
    assert distillation(given, given, how).item() == pytest.approx(0, abs=1e-7)


def test_orthonormality_is_the_distance_from_orthonormal_rows():
    model = nn.Sequential(nn.Linear(3, 2), nn.Conv2d(1, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 2.0, 0]]))  # W W^T - 1 = diag(0, 3)
        model[1].weight.copy_(torch.tensor([0.6, 0.8]).view(2, 1, 1, 1))  # a column of length 1
    assert orthonormality(model).item() == pytest.approx(9)


def test_one_step_of_sgd_by_hand():
    model = nn.Linear(6, 3)
    data = context(examples=4)
    before = model.weight.detach().clone()
    ((inputs, labels),) = loader(data.training_data.dataset, 4, 0)
    loss = cross_entropy(model(inputs), labels, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, model.weight)
    options = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0.01, "label_smoothing": 0.1, "schedule": "constant"}
    train(model, Training(epochs=1, learning_rate=0.5, batch_size=4, **options), data)
    assert torch.allclose(model.weight, before - 0.5 * (gradient + 0.01 * before), atol=1e-6)


def test_the_average_of_the_weights_comes_out():
    def trained(average):
        training = Training(epochs=1, learning_rate=0.1, batch_size=12, average=average, schedule="constant")
        return train(net(), training, context()).state_dict()

    # Two steps: the average of w0, w1, w2 with decay d is d^2 w0 + d (1 - d) w1 + (1 - d) w2.
    first = train(net(), Training(epochs=1, learning_rate=0.1, batch_size=24, schedule="constant"), context())
    assert first is not None
    plain, averaged, start = trained(0.0), trained(0.5), net().state_dict()
    for name, value in averaged.items():
        assert not torch.equal(value, plain[name])
        low, high = torch.minimum(start[name], plain[name]), torch.maximum(start[name], plain[name])
        assert ((value >= low - 0.11) & (value <= high + 0.11)).all()


def test_elements_with_a_factor_learn_so_many_times_as_fast():
    models = net(), net()
    factors = torch.ones(8, 6)
    factors[:4] = 10
    models[1][0].learning_rate_factors = {"weight": factors}
    training = Training(epochs=1, learning_rate=0.001, batch_size=24, optimizer="sgd", momentum=0)
    start = net()[0].weight
    steps = [train(model, training, context())[0].weight - start for model in models]
    assert torch.allclose(steps[1], factors * steps[0], atol=1e-6)


def test_factors_are_those_of_what_is_trained_behind_a_mask_and_none_where_they_no_longer_fit():
    models = net(), net(), net()
    for i, model in enumerate(models):
        parametrize.register_parametrization(model[0], "weight", Mask(torch.arange(48).view(8, 6) % 3 > 0))
        shape = [(8, 6), (8, 6), (7, 6)][i]
        model[0].learning_rate_factors = {"weight": torch.full(shape, 10.0)} if i else {}
    training = Training(epochs=1, learning_rate=0.001, batch_size=24, optimizer="sgd", momentum=0)
    start = net()[0].weight * models[0][0].parametrizations.weight[0].mask
    steps = [train(model, training, context())[0].weight - start for model in models]
    assert torch.allclose(steps[1], 10 * steps[0], atol=1e-6)
    assert torch.equal(steps[2], steps[0])


@pytest.mark.parametrize("inputs", [torch.zeros(4, 6), torch.zeros(4, 3, 6)])
def test_cutmix_is_for_images(inputs):
    with pytest.raises(InputError, match="cutmix cuts pieces out of images, not of inputs of shape 4x"):
        mix(inputs, Training(epochs=1, learning_rate=1, cutmix=1.0))


def test_tokens_are_not_mixed():
    with pytest.raises(InputError, match="mixup takes means of two inputs, not of tokens"):
        mix(torch.zeros(4, 6, dtype=torch.int64), Training(epochs=1, learning_rate=1, mixup=1.0))


def test_a_teacher_of_another_task():
    teacher = nn.Linear(6, 4)
    training = Training(epochs=1, learning_rate=0.1, distill={})
    with pytest.raises(InputError, match="the teacher has 4 outputs and the model 3"):
        train(net(), training, context(), teacher=teacher)


class Hasty(Conditional):
    """Two heads on one batch norm, which counts the batches that it normalizes; who is sure leaves at the first."""

    paths = ("exit", "full")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.exit, self.rest = nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Linear(6, 3)

    def run(self, x):
        x = self.trunk(x)
        answer = self.exit(x)
        return answer if self.takes("exit", answer.softmax(1).amax(1) >= 0.4) else self.rest(x)


def test_each_path_of_a_conditional_model_learns_from_all_examples():
    """The gradient of the mean of both losses is half of each head's own."""
    data, made = context(), []
    training = Training(epochs=1, learning_rate=0.1, batch_size=24, optimizer="sgd", momentum=0, schedule="constant")
    model = train(Hasty(), training, data)
    assert int(model.trunk.num_batches_tracked) == 2  # once for each path
    assert model.only is None
    for name in ("exit", "rest"):
        alone = Hasty()
        head = getattr(alone, name)
        x, labels = data.training_data.dataset.tensors
        cross_entropy(head(alone.trunk(x)), labels).backward()
        made.append(head.weight - 0.1 * head.weight.grad / 2)
        torch.testing.assert_close(getattr(model, name).weight, made[-1])


def test_a_moving_average_forgets_where_it_began():
    """A decay of a thousand steps, after six of them."""
    model = net()
    average = train(net(), Training(epochs=1, learning_rate=0.05, average=0.999), context())
    weights = train(net(), Training(epochs=1, learning_rate=0.05), context())
    begun, came, now = (m[0].weight for m in (model, average, weights))
    assert (came - now).norm() < (came - begun).norm() / 2


class Unreadable(TensorDataset):
    def __getitem__(self, index):
        if index == 7:
            raise OSError("image file is truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize("views", [0, 1])
def test_training_data_that_cannot_be_read(views):
    data = Context(torch.zeros(1, 6), loader(Unreadable(torch.randn(9, 6), torch.arange(9) % 3), 4, 0), 0, {})
    how = Training(epochs=1, learning_rate=0.1, distill={"views": views})
    with pytest.raises(InputError, match="the training data cannot be read: OSError: image file is truncated; look"):
        train(net(), how, data, teacher=Teacher())


def test_options_that_change_nothing_are_refused():
    with pytest.raises(ValidationError, match="adamw has no momentum to set"):
        Training(epochs=1, learning_rate=0.1, momentum=0.5)


class Teacher(nn.Module):
    """Says the same each time, and counts how often it is asked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.asked = nn.Linear(6, 3), 0

    def forward(self, x):
        self.asked += len(x)
        return self.layer(x)


def distilled(views, epochs=3, **options):
    training = Training(epochs=epochs, learning_rate=0.05, batch_size=5, distill={"views": views}, **options)
    teacher, model = Teacher(), net()
    torch.manual_seed(4)
    return train(model, training, context(), teacher=teacher).state_dict(), teacher.asked


def test_views_keep_what_the_teacher_says():
    """Nothing is augmented here, so that a view is the example itself."""
    asked_each_time, count = distilled(views=0)
    assert count == 3 * 24
    for views in (1, 2):  # two are one here
        kept, count = distilled(views=views)
        assert count == 24
        assert all(torch.equal(kept[name], asked_each_time[name]) for name in kept)


def test_epochs_take_turns_at_the_views():
    views = Views([(torch.full((2, 1), float(time)), torch.zeros(2), torch.zeros(2, 3)) for time in range(3)])
    seen = []
    for views.turn in range(5):
        seen.append(views[1][0].item())
    assert (len(views), seen) == (2, [0, 1, 2, 0, 1])


def on_images(epochs, views, checkpoint=None, log=lambda line: None, outer=4):
    """A network with dropout and a teacher on cropped and flipped images: the weights, all that each was given."""
    images = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    data = Context(images[:1], loader(TensorDataset(images, torch.arange(12) % 3), 4, 0), 0, plugins.formulas())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3))
    teacher, given = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), {"model": [], "teacher": []}
    for name, module in (("model", model), ("teacher", teacher)):
        module.register_forward_pre_hook(lambda _, args, name=name: given[name].append(args[0]))
    options = {"batch_size": 12, "crop": 1, "flip": True, "schedule": "constant"}
    training = Training(epochs=epochs, learning_rate=0.1, distill={"views": views}, **options)
    torch.manual_seed(outer)
    return train(model, training, data, log, teacher, checkpoint).state_dict(), given


def test_each_epoch_sees_the_view_whose_turn_it_is():
    _, given = on_images(epochs=3, views=2)
    assert len(given["teacher"]) == 2
    first, second = (sorted(map(tuple, view.flatten(1).tolist())) for view in given["teacher"])
    seen = [sorted(map(tuple, batch.flatten(1).tolist())) for batch in given["model"]]
    assert seen == [first, second, first]
    assert first != second


def test_no_more_views_than_epochs_are_made():
    _, given = on_images(epochs=2, views=5)
    assert len(given["teacher"]) == 2


def test_views_do_not_depend_on_what_was_drawn_before_nor_change_what_is_drawn_behind():
    def drawn(outer):
        weights, given = on_images(epochs=1, views=1, outer=outer)
        return weights, given["teacher"][0], torch.rand(3)

    one, again, other = drawn(4), drawn(4), drawn(5)
    assert all(torch.equal(one[0][name], again[0][name]) for name in one[0])
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[2], other[2])
    torch.manual_seed(4)
    torch.nn.functional.dropout(torch.ones(12, 36), 0.5)  # all that training draws itself
    assert torch.equal(torch.rand(3), one[2])


def test_training_with_views_goes_on_to_the_same_weights(tmp_path):
    whole, _ = on_images(epochs=4, views=3)

    def kill(line):
        if "epoch 3" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_images(4, 3, tmp_path / "epoch.pt", kill)
    resumed, _ = on_images(4, 3, tmp_path / "epoch.pt", outer=9)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_views_are_of_single_examples():
    with pytest.raises(ValidationError, match=r"leave out distill\.views, or mixup"):
        Training(epochs=1, learning_rate=1, mixup=0.2, distill={"views": 2})


def test_warmup_has_to_end():
    with pytest.raises(ValidationError, match="warmup takes 2 of 2 epochs"):
        Training(epochs=2, learning_rate=1, warmup=2)


@pytest.mark.parametrize("more", [{"mixup": 0.4}, {"distill": {"views": 2}}], ids=["mixup", "views"])
def test_training_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path, more):
    training = Training(
        epochs=4, learning_rate=0.05, batch_size=4, optimizer="sgd", average=0.9, warmup=1, orthonormal=0.01, **more
    )
    model = net()
    torch.manual_seed(5)
    whole = train(model, training, context(), teacher=Teacher()).state_dict()

    class Killed(Exception):
        pass

    def kill(line):
        if "epoch 3" in line:
            raise Killed

    model = net()
    torch.manual_seed(5)
    with pytest.raises(Killed):
        train(model, training, context(), kill, Teacher(), checkpoint=tmp_path / "epoch.pt")
    model = net()
    torch.manual_seed(77)
    resumed = train(model, training, context(), teacher=Teacher(), checkpoint=tmp_path / "epoch.pt").state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


# --- rounds -----------------------------------------------------------------------------------------------------------

ROUNDS = (
    f'task = "digits"\nseed = 3\nvalidation = 0.2{SMALL}'
    + """[[stages]]
train = { epochs = 2, learning_rate = 0.01 }
[[stages]]
[stages.rounds]
times = 4
RULE
[[stages.rounds.stages]]
sparsifier = "magnitude"
sparsity = 0.3
[[stages.rounds.stages]]
train = { epochs = 1, learning_rate = 0.002, distill = { weight = 0.5 } }
[[stages]]
merge = "batch-norm"
"""
)


def made(tmp_path, rule, name="small"):
    (tmp_path / "recipe.toml").write_text(ROUNDS.replace("RULE", rule))
    lines = []
    compress(tmp_path / "recipe.toml", tmp_path / name, log=lines.append)
    return read_manifest(tmp_path / name).provenance.steps, lines


def test_rounds_end_when_the_target_is_reached(tmp_path):
    """One of four: 30 % zeros take the score from 0.147 to 0.110."""
    steps, _ = made(tmp_path, "until = { score = 0.12 }")
    assert all(step.quality is not None for step in steps)
    scores = [step.score for step in steps if step.stage.startswith("round")]
    assert len(scores) == 2
    assert scores[-1] <= 0.12 < steps[1].score


def test_no_round_runs_where_the_target_is_reached_before(tmp_path):
    steps, _ = made(tmp_path, "until = { parameters = 1_000_000 }")
    assert [step.stage for step in steps] == ["architecture", "train", "merge batch-norm"]


def test_a_round_judges_by_what_its_inner_rounds_left(tmp_path):
    """The inner round, the last stage, is undone: its 90 % zeros do not end the outer rounds, of which two run."""
    inner = """[[stages.rounds.stages]]
[stages.rounds.stages.rounds]
times = 1
quality = 1.0
[[stages.rounds.stages.rounds.stages]]
sparsifier = "random"
sparsity = 0.9
"""
    text = ROUNDS.replace("RULE", "until = { nonzeros = 20_000 }").replace("times = 4", "times = 2")
    text = text.replace("[[stages]]\nmerge", f"{inner}[[stages]]\nmerge")
    (tmp_path / "recipe.toml").write_text(text)
    lines = []
    compress(tmp_path / "recipe.toml", tmp_path / "small", log=lines.append)
    names = [step.stage for step in read_manifest(tmp_path / "small").provenance.steps]
    assert sum(name.endswith("(undone)") for name in names) == 2
    assert names.count("round 2: train") == 1


def test_a_round_that_costs_too_much_quality_is_undone(tmp_path, monkeypatch):
    from micronet_eval import recipe

    real, calls = recipe.measure, []

    def measured(model, task, data):
        calls.append(model)
        quality = real(model, task, data)
        return quality.model_copy(update={"measured": 0.5}) if len(calls) == 6 else quality  # after the second round

    monkeypatch.setattr(recipe, "measure", measured)
    steps, lines = made(tmp_path, "quality = 0.6")
    names = [step.stage for step in steps]
    assert names[-3:] == ["round 2: sparsifier magnitude (undone)", "round 2: train (undone)", "merge batch-norm"]
    assert any("round 2 is undone" in line for line in lines)
    assert steps[-1].nonzeros == pytest.approx(steps[3].nonzeros, rel=0.02)  # as after the first round, norms merged


def test_rounds_may_hold_rounds(tmp_path):
    inner = """
[[stages.rounds.stages]]
[stages.rounds.stages.rounds]
times = 2
[[stages.rounds.stages.rounds.stages]]
statistics = { batches = 1 }
"""
    text = ROUNDS.replace("RULE", "").replace("times = 4", "times = 2")
    text = text[: text.index("[[stages.rounds.stages]]")] + inner + text[text.index("[[stages]]\nmerge") :]
    (tmp_path / "recipe.toml").write_text(text)
    compress(tmp_path / "recipe.toml", tmp_path / "small")
    names = [step.stage for step in read_manifest(tmp_path / "small").provenance.steps]
    inside = [f"round {outer}: round {within}: statistics" for outer in (1, 2) for within in (1, 2)]
    assert names == ["architecture", "train", *inside, "merge batch-norm"]


def test_targets_are_all_to_be_reached():
    step = Step(stage="", parameters=10, nonzeros=5, mults=3, adds=2, score=0.5)
    assert Target(parameters=10, operations=5).reached(step)
    assert not Target(parameters=10, operations=4).reached(step)
    assert not Target(score=0.4).reached(step)
    assert not Target().reached(step)


@pytest.mark.parametrize("rule", [{"quality": 0.9}, {"until": {"score": 0.1}}])
@pytest.mark.parametrize("inside", [False, True])
def test_quality_and_score_need_data_that_is_held_out(rule, inside):
    stage = {"rounds": {"times": 1, **rule, "stages": [{"merge": "batch-norm"}]}}
    recipe = {
        "task": "digits",
        "architecture": {"name": "wide-resnet"},
        "submission": {"name": "a", "authors": ["b"]},
        "stages": [{"rounds": {"times": 1, "stages": [stage]}} if inside else stage],
    }
    with pytest.raises(ValidationError, match=r"validation = 0\.1"):
        Recipe.model_validate(recipe)
    Recipe.model_validate({**recipe, "validation": 0.1})


def test_a_round_of_the_documentation_removes_more_each_time(tmp_path):
    page = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    (text,) = re.findall(r"```toml\n(\[\[stages\]\]\n\[stages.rounds\].*?)```", page, re.S)
    short = re.sub(r"times = 10", "times = 2", re.sub(r"quality = .*", "", re.sub(r"epochs = \d+", "epochs = 1", text)))
    (tmp_path / "recipe.toml").write_text(f'task = "digits"\nvalidation = 0.1{SMALL}{short}')
    compress(tmp_path / "recipe.toml", tmp_path / "mine")
    steps = read_manifest(tmp_path / "mine").provenance.steps
    assert steps[3].nonzeros < 0.8 * steps[1].nonzeros


def test_training_that_diverges_is_one_clear_message(tmp_path):
    stages = '[[stages]]\ntrain = { epochs = 2, learning_rate = 1e20, optimizer = "sgd" }\n'
    (tmp_path / "recipe.toml").write_text(f'task = "digits"{SMALL}{stages}')
    lines = []
    with pytest.raises(InputError, match=r"field 'stages.0': .*loss of an epoch is (nan|inf); .*smaller learning_rate"):
        compress(tmp_path / "recipe.toml", tmp_path / "small", log=lines.append)
    assert len(lines) == 1  # no epoch
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    "stage",
    [
        "train = { epochs = 1, learning_rate = 0.01, batch_size = 449 }",
        'sparsifier = "gradual"\nbatch_size = 449',
        "statistics = { batches = 4 }",
    ],
)
def test_a_last_batch_of_one_example_that_batch_norm_cannot_normalize(tmp_path, stage):
    """Of 1,348 images, one is left; the last feature maps of the network have one pixel."""
    small = SMALL.replace('"wide-resnet"\ndepth = 10\nwidth = 1', '"resnet"')
    (tmp_path / "recipe.toml").write_text(f'task = "digits"\nbatch_size = 449{small}[[stages]]\n{stage}\n')
    with pytest.raises(InputError, match=r"stages.0': the last batch has one example, .* take another batch_size"):
        compress(tmp_path / "recipe.toml", tmp_path / "small")


def test_test_data_is_never_looked_at(tmp_path, guarded):
    text = ROUNDS.replace("RULE", "quality = 0.1").replace('"digits"', '"guarded"')
    (tmp_path / "recipe.toml").write_text(text)
    compress(tmp_path / "recipe.toml", tmp_path / "small")
    assert (tmp_path / "small" / "weights.safetensors").exists()


def test_what_nothing_was_compressed_from_cannot_teach(tmp_path):
    text = ROUNDS.replace("RULE", "").replace("epochs = 2, learning_rate", "epochs = 1, distill = {}, learning_rate")
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(InputError, match=r"stages.0.*distill learns from the uncompressed model"):
        compress(tmp_path / "recipe.toml", tmp_path / "small")
    assert not (tmp_path / "small").exists()


# --- faults of a late stage -------------------------------------------------------------------------------------------

TWICE = f'task = "digits"{SMALL}' + 2 * "[[stages]]\ntrain = { epochs = 2, learning_rate = 0.01 }\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ('augment = "nowhere.toml"', "nowhere.toml is missing"),
        ('augment = "policy.toml"', "the policy is for 3 channels, the images have 1"),
        ("distill = {}", "distill learns from the uncompressed model"),
    ],
)
def test_what_a_late_stage_lacks_is_told_before_anything_is_trained(tmp_path, monkeypatch, option, message):
    operation = "{ name = 'invert', probability = 1, magnitude = 1 }"
    policy = f"low = [0, 0, 0]\nhigh = [1, 1, 1]\nsub_policies = [[{operation}]]"
    monkeypatch.chdir(tmp_path)
    Path("policy.toml").write_text(policy)
    Path("recipe.toml").write_text(f"{option}, epochs".join(TWICE.rsplit("epochs", 1)))
    lines = []
    with pytest.raises(InputError, match=f"field 'stages.1': .*{message}"):
        compress("recipe.toml", "small", log=lines.append)
    assert lines == []


def test_what_is_kept_outlasts_a_fault_of_a_late_stage(tmp_path, monkeypatch):
    """An image that cannot be read in the second epoch of the second stage: what was done is not done again."""
    digits, read = plugins.lookup("task", "digits"), []

    class Damaged(TensorDataset):
        def __getitem__(self, index):
            read.append(index)
            if len(read) > 3.5 * len(self):
                raise InputError("an image is damaged")
            return super().__getitem__(index)

    (tmp_path / "recipe.toml").write_text(TWICE)
    with monkeypatch.context() as patched:
        damaged = Damaged(*digits.dataset(None, "train").tensors)
        patched.setattr("micronet_eval.recipe.data_of", lambda *words: (damaged, None))
        with pytest.raises(InputError, match=r"field 'stages.1': an image is damaged"):
            compress(tmp_path / "recipe.toml", tmp_path / "small")
    kept = {path.name for path in (tmp_path / "small" / KEPT).iterdir()}
    assert kept == {"recipe.sha256", "1.json", "1.pt", "2.epoch.pt"}
    lines = []
    compress(tmp_path / "recipe.toml", tmp_path / "small", log=lines.append, resume=True)
    assert [line[:14] for line in lines if line.startswith("  epoch")] == ["  epoch 2 of 2"]


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_resuming_after_a_kill_gives_the_same_files(tmp_path):
    made(tmp_path, "until = { nonzeros = 30_000 }", "whole")
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from micronet_eval.recipe import compress
        compress(Path(sys.argv[1]), Path(sys.argv[2]), log=lambda line: print(line, flush=True))
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "recipe.toml"), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if "round 1: train" in line:
            time.sleep(0.3)
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert (tmp_path / "killed" / KEPT).is_dir()
    compress(tmp_path / "recipe.toml", tmp_path / "killed", resume=True)
    assert not (tmp_path / "killed" / KEPT).exists()
    for name in ("weights.safetensors", "submission.toml"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_cannot_be_resumed(tmp_path, run):
    (tmp_path / "recipe.toml").write_text(ROUNDS.replace("RULE", ""))
    code, _, err = run("compress", tmp_path / "recipe.toml", "-o", tmp_path / "out", "--resume")
    assert code == 2
    assert "has no .kept: there is nothing to resume" in err
    (tmp_path / "out" / KEPT).mkdir(parents=True)
    (tmp_path / "out" / KEPT / "recipe.sha256").write_text("another")
    code, _, err = run("compress", tmp_path / "recipe.toml", "-o", tmp_path / "out", "--resume")
    assert code == 2
    assert "another recipe" in err


def test_what_was_kept_is_not_overwritten(tmp_path, run, monkeypatch):
    (tmp_path / "recipe.toml").write_text(TWICE)
    words = ("compress", tmp_path / "recipe.toml", "-o", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("micronet_eval.recipe.write_together", lambda *files: sys.exit(1))
        run(*words)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / KEPT).iterdir()}
    status, _, err = run(*words)
    assert (status, err.count("\n")) == (2, 1)
    assert "go on by --resume, or remove it" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / KEPT).iterdir()} == before
    assert run(*words, "--resume")[0] == 0
    status, _, err = run(*words, "--resume")
    assert status == 2
    assert f"{tmp_path / 'out'} is finished" in err


def test_output_that_nobody_reads_is_no_fault_of_the_folder(tmp_path):
    """Of a `log` that writes into a pipe; the command itself goes on to the end, as `compress ... | head` shows."""
    (tmp_path / "recipe.toml").write_text(TWICE)

    def broken(line):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        compress(tmp_path / "recipe.toml", tmp_path / "out", log=broken)


def test_the_recipe_of_the_documentation_runs(tmp_path):
    (text,) = re.findall(
        r"```toml\n(task = .*?)```", (Path(__file__).parent.parent / "docs/recipes.md").read_text(), re.S
    )
    short = re.sub(r"epochs = \d+", "epochs = 1", text)
    (tmp_path / "recipe.toml").write_text(short)
    compress(tmp_path / "recipe.toml", tmp_path / "mine")
    stages = [step.stage for step in read_manifest(tmp_path / "mine").provenance.steps]
    assert stages == [
        "architecture", "train", "sparsifier magnitude", "train", "merge batch-norm", "quantizer fixed-point"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["wavecomp", "wavecomp-digits"])
def test_the_recipes_are_valid(name):
    recipe = read_toml(Path(__file__).parent.parent / "recipes" / f"{name}.toml", Recipe)
    plugins.lookup("task", recipe.task)
    for place, stage in named_stages(recipe.stages):
        strategy_of(stage, place)


def test_the_pipeline_of_wavecomp_in_small(tmp_path):
    text = (Path(__file__).parent.parent / "recipes/wavecomp-digits.toml").read_text()
    short = re.sub(r"epochs = \d+", "epochs = 2", text).replace("times = 4", "times = 1").replace("quality = 0.94", "")
    (tmp_path / "recipe.toml").write_text(short)
    compress(tmp_path / "recipe.toml", tmp_path / "small")
    report = evaluate(tmp_path / "small")
    steps = report.storage, read_manifest(tmp_path / "small").provenance.steps
    assert max(max(layer.input_bits, layer.weight_bits) for layer in report.layers if layer.mults) == 12
    assert steps[0].parameters < steps[1][1].parameters * 0.8
    assert steps[0].nonzeros < steps[0].parameters * 0.7
