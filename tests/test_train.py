"""micronet-eval train: what it writes, what starts from it, kills, several processes; bf16, layouts, ShakeDrop."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from micronet_eval import evaluate, kept, plugins, training
from micronet_eval.conditional import Conditional
from micronet_eval.errors import InputError
from micronet_eval.kept import KEPT
from micronet_eval.parallel import Team
from micronet_eval.recipe import compress, train_only
from micronet_eval.scoring import account
from micronet_eval.strategy import Context
from micronet_eval.trace import trace
from micronet_eval.training import Distillation, Ensemble, Training, loader, takes_channels_last, train
from micronet_plugins.architectures import pyramidnet
from micronet_plugins.shake_drop import ShakeDrop, keeps

RECIPE = f'task = "digits"\nseed = 3\nvalidation = 0.2{SMALL}'
ALL = (
    'epochs = 3, learning_rate = 0.02, optimizer = "sgd", mixup = 0.4, cutmix = 0.4, average = 0.9, warmup = 1, '
    'crop = 1, erase = 0.3, precision = "bf16"'
)


def recipe(path, *stages, head=RECIPE):
    path.write_text(head + "".join(f"[[stages]]\n{stage}\n" for stage in stages))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that `train` wrote, and the lines that it told."""
    folder, lines = tmp_path_factory.mktemp("trained"), []
    path = recipe(folder / "recipe.toml", "train = { epochs = 2, learning_rate = 0.01 }")
    train_only(path, folder / "made", log=lines.append)
    return folder / "made", lines


# --- what comes out of it ---------------------------------------------------------------------------------------------


def test_train_writes_a_submission_and_what_others_start_from(trained, tmp_path):
    folder, lines = trained
    assert {p.name for p in folder.iterdir()} == {
        "submission.toml", "weights.safetensors", "trained.safetensors", "recipe.toml"
    }  # fmt: skip
    assert evaluate(folder).quality.measured > 0.5
    # The share right after the last epoch is the quality that is measured then.
    (told,) = re.findall(r"epoch 2 of 2: .* right, ([\d.]+)% held out", "\n".join(lines))
    (measured,) = re.findall(r"^train: .*held out ([\d.]+)", "\n".join(lines), re.M)
    assert float(told) / 100 == pytest.approx(float(measured), abs=1e-4)
    # Merged and packed, the state dict is the submission.
    path = recipe(tmp_path / "recipe.toml", 'merge = "batch-norm"', head=f'start = "{folder}"\n{RECIPE}')
    compress(path, tmp_path / "again")
    assert (tmp_path / "again/weights.safetensors").read_bytes() == (folder / "weights.safetensors").read_bytes()


def test_a_start_that_has_seen_what_is_held_out_is_refused(trained, tmp_path):
    folder, _ = trained
    for change in (("seed = 3", "seed = 4"), ("validation = 0.2", "validation = 0.3")):
        head = f'start = "{folder}"\n{RECIPE}'.replace(*change)
        with pytest.raises(InputError, match=r"field 'start': .* was trained on examples that are held out here"):
            compress(recipe(tmp_path / "recipe.toml", 'merge = "batch-norm"', head=head), tmp_path / "out")
    head = f'start = "{folder}"\n{RECIPE}'.replace("validation = 0.2", "")
    compress(recipe(tmp_path / "recipe.toml", 'merge = "batch-norm"', head=head), tmp_path / "out")


def test_a_start_cannot_hide_behind_a_recipe_that_did_not_make_it(tmp_path):
    stage, folder = "train = { epochs = 1, learning_rate = 0.01 }", tmp_path / "made"
    train_only(recipe(tmp_path / "recipe.toml", stage, head=RECIPE.replace("validation = 0.2", "")), folder)
    compress(recipe(tmp_path / "recipe.toml", stage), folder)
    path = recipe(tmp_path / "recipe.toml", stage, head=f'start = "{folder}"\n{RECIPE}')
    with pytest.raises(InputError, match=r"recipe.toml is not what trained.safetensors there was trained by"):
        compress(path, tmp_path / "out")


def test_a_start_is_not_overwritten(trained, tmp_path):
    folder, _ = trained
    path = recipe(tmp_path / "recipe.toml", 'merge = "batch-norm"', head=f'start = "{folder}"\n{RECIPE}')
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match=r"recipe.toml needs what lies in .*, where nothing may take its place"):
        compress(path, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_start_may_know_all_of_other_data(tmp_path):
    """Noise, here. Where that had a start of its own, what is held out may have been seen there."""
    stage, noise = "train = { epochs = 1, learning_rate = 0.01 }", 'data = "noise"'
    every = RECIPE.replace("validation = 0.2", "")
    train_only(recipe(tmp_path / "every.toml", stage, head=every), tmp_path / "every")
    for start in ("", f'start = "{tmp_path / "every"}"'):
        made = tmp_path / f"noise {bool(start)}"
        train_only(recipe(tmp_path / "noise.toml", stage, head=f"{start}\n{noise}\n{every}"), made)
    head = f'start = "{tmp_path / "noise "}%s"\n{RECIPE}'
    compress(recipe(tmp_path / "recipe.toml", 'merge = "batch-norm"', head=head % False), tmp_path / "out")
    with pytest.raises(InputError, match=r"field 'start': .* may have seen what is held out here"):
        compress(recipe(tmp_path / "recipe.toml", 'merge = "batch-norm"', head=head % True), tmp_path / "other")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ('start = "nowhere"\n', "field 'start': nowhere/trained.safetensors is missing"),
        ('start = "FOLDER"\n', "field 'start': .* does not fit the architecture 'wide-resnet'"),
    ],
)
def test_a_start_that_does_not_fit(trained, tmp_path, head, message):
    text = head.replace("FOLDER", str(trained[0])) + RECIPE.replace("width = 1", "width = 2")
    with pytest.raises(InputError, match=message):
        compress(recipe(tmp_path / "recipe.toml", 'merge = "batch-norm"', head=text), tmp_path / "out")


def test_a_network_learns_from_a_submission(trained, tmp_path, monkeypatch):
    """A teacher of weight 1 is all there is: labels that are wrong do no harm."""
    digits = plugins.lookup("task", "digits")

    def wrong(root, split):
        images, labels = digits.dataset(root, split).tensors
        return TensorDataset(images, (labels + 5) % 10 if split == "train" else labels)

    registered = plugins.lookup
    fake = replace(digits, dataset=wrong)
    monkeypatch.setattr(plugins, "lookup", lambda kind, name: fake if kind == "task" else registered(kind, name))
    distill = f'distill = {{ weight = 1, teacher = "{trained[0]}" }}'
    path = recipe(tmp_path / "recipe.toml", f"train = {{ epochs = 4, learning_rate = 0.01, {distill} }}")
    train_only(path, tmp_path / "made")
    monkeypatch.undo()
    assert evaluate(tmp_path / "made").quality.measured > 0.6


def test_several_teachers_teach_the_mean_of_their_logits(trained, tmp_path):
    models = nn.Linear(2, 3), nn.Linear(2, 3)
    x = torch.randn(5, 2)
    torch.testing.assert_close(Ensemble(models)(x), (models[0](x) + models[1](x)) / 2)
    made = []
    for name, teacher in (("one", f'"{trained[0]}"'), ("two", f'["{trained[0]}", "{trained[0]}"]')):
        stage = f"train = {{ epochs = 1, learning_rate = 0.01, distill = {{ teacher = {teacher} }} }}"
        train_only(recipe(tmp_path / f"{name}.toml", stage), tmp_path / name)
        made.append(load_file(tmp_path / name / "trained.safetensors"))
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())  # (x + x) / 2 is x


def test_without_a_name_the_teacher_is_the_uncompressed_model():
    assert Distillation().folders == Distillation(teacher="").folders == ()
    assert Distillation(teacher="one").folders == ("one",)


def test_a_teacher_knows_the_task(trained, tmp_path):
    text = RECIPE.replace('"digits"', '"cifar100"\ndata = "noise"')
    stage = f'train = {{ epochs = 1, learning_rate = 0.01, distill = {{ teacher = "{trained[0]}" }} }}'
    with pytest.raises(InputError, match="was trained for the task digits, not cifar100"):
        train_only(recipe(tmp_path / "recipe.toml", stage, head=text), tmp_path / "out")


@pytest.mark.parametrize("change", [("seed = 3", "seed = 4"), ("validation = 0.2", "validation = 0.3")])
def test_a_teacher_that_has_seen_what_is_held_out_is_refused(trained, tmp_path, change):
    stage = f'train = {{ epochs = 1, learning_rate = 0.01, distill = {{ teacher = "{trained[0]}" }} }}'
    with pytest.raises(InputError, match=r"made was trained on examples that are held out here; hold them out there"):
        train_only(recipe(tmp_path / "recipe.toml", stage, head=RECIPE.replace(*change)), tmp_path / "out")
    shutil.copytree(trained[0], tmp_path / "foreign", ignore=shutil.ignore_patterns("recipe.toml"))
    stage = stage.replace(str(trained[0]), str(tmp_path / "foreign"))  # of which nobody knows
    train_only(recipe(tmp_path / "recipe.toml", stage, head=RECIPE.replace(*change)), tmp_path / "out")


def test_what_a_teacher_has_of_its_own_teacher_counts_too(tmp_path):
    """Noise, learned from a network that knows all examples; and a start whose recipe is gone is told."""
    stage, every = "train = { epochs = 1, learning_rate = 0.01 %s }", RECIPE.replace("validation = 0.2", "")
    train_only(recipe(tmp_path / "every.toml", stage % "", head=every), tmp_path / "every")
    of = f', distill = {{ teacher = "{tmp_path}/%s" }}'
    train_only(
        recipe(tmp_path / "noise.toml", stage % of % "every", head=f'data = "noise"\n{every}'), tmp_path / "noise"
    )
    with pytest.raises(InputError, match=r"noise was trained on other data from .*every, which may have seen"):
        train_only(recipe(tmp_path / "recipe.toml", stage % of % "noise"), tmp_path / "out")
    (tmp_path / "every/recipe.toml").unlink()
    with pytest.raises(InputError, match=r"field 'start': .*every/recipe.toml is missing"):
        train_only(
            recipe(tmp_path / "recipe.toml", stage % "", head=f'start = "{tmp_path}/every"\n{RECIPE}'), tmp_path / "out"
        )


def test_a_teacher_is_not_overwritten(trained, tmp_path):
    stage = f'train = {{ epochs = 1, learning_rate = 0.01, distill = {{ teacher = "{trained[0]}" }} }}'
    before = {file.name: file.read_bytes() for file in trained[0].iterdir()}
    with pytest.raises(InputError, match=r"recipe.toml needs what lies in .*made, where nothing may take its place"):
        train_only(recipe(tmp_path / "recipe.toml", stage), trained[0])
    assert {file.name: file.read_bytes() for file in trained[0].iterdir()} == before


def test_what_a_kill_left_of_files_goes_when_they_are_written(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for name in (".weights.safetensors.u25idkmi", ".notes.txt.u25idkmi"):
        (made / name).write_bytes(b"half")
    train_only(recipe(tmp_path / "recipe.toml", "train = { epochs = 1, learning_rate = 0.01 }"), made)
    names = {"submission.toml", "weights.safetensors", "trained.safetensors", "recipe.toml", ".notes.txt.u25idkmi"}
    assert {path.name for path in made.iterdir()} == names


def test_what_a_kill_left_of_what_was_kept_is_in_nobodys_way(tmp_path, monkeypatch):
    """What was kept goes when all is written."""
    path, made = recipe(tmp_path / "recipe.toml", "train = { epochs = 1, learning_rate = 0.01 }"), tmp_path / "made"

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(kept.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        train_only(path, made)
    monkeypatch.undo()
    assert (made / KEPT / "1.pt").exists()
    with pytest.raises(InputError, match="is finished, and there is nothing to resume; run without --resume"):
        train_only(path, made, resume=True)
    train_only(path, made)
    assert not (made / KEPT).exists()


def test_the_command_tells_epochs_loss_accuracy_and_the_time_left(tmp_path, run):
    path = recipe(tmp_path / "recipe.toml", "train = { epochs = 2, learning_rate = 0.01 }")
    code, out, _ = run("train", path, "-o", tmp_path / "out")
    assert code == 0
    number = r"\d+\.\d+"
    line = rf"  epoch \d of 2: loss {number}, {number}% right, {number}% held out; \d:\d\d:\d\d left at most"
    assert len(re.findall(line, out)) == 2
    assert "epoch 2 of 2" in out
    assert "0:00:00 left at most" in out
    assert out.endswith(f"wrote {tmp_path / 'out'}\n")


# --- killed at any moment ---------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from micronet_eval.recipe import train_only
recipe, folder, kind, number = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
calls = 0
def count(*_):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
rename = Path.replace
if kind == "rename":
    Path.replace = lambda self, target: (count(), rename(self, target))[1]
train_only(recipe, folder, progress=count if kind == "batch" else lambda done, total: None)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe that draws in every way there is, and the folder that it makes when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    path = recipe(folder / "recipe.toml", f"train = {{ {ALL} }}")
    train_only(path, folder / "made")
    return path, folder / "made"


# An epoch has 17 batches; the mark of the recipe is the first file, then come two epochs and the files of the stage.
@pytest.mark.parametrize(("kind", "number"), [("batch", 5), ("batch", 45), ("rename", 3)])
def test_a_kill_in_the_middle_of_an_epoch_or_of_writing_changes_no_bit(whole, tmp_path, kind, number):
    path, made = whole
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, path, tmp_path / "killed", kind, str(number)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / KEPT / "1.epoch.pt").exists() == (number != 5)
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    lines = []
    train_only(path, tmp_path / "killed", resume=True, log=lines.append)
    epochs = [line for line in lines if line.startswith("  epoch")]
    assert len(epochs) == {("batch", 5): 3, ("batch", 45): 1, ("rename", 3): 2}[kind, number]
    for name in ("trained.safetensors", "weights.safetensors", "submission.toml"):
        assert (tmp_path / "killed" / name).read_bytes() == (made / name).read_bytes(), name


# --- several processes ------------------------------------------------------------------------------------------------

TOGETHER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset
from micronet_eval.conditional import Conditional
from micronet_eval.parallel import team
from micronet_eval.recipe import train_only
from micronet_eval.strategy import Context
from micronet_eval.training import Training, loader, train

class Hasty(Conditional):
    paths = ("exit", "full")

    def __init__(self):
        super().__init__()
        self.trunk, self.exit, self.rest = nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Linear(6, 3)

    def run(self, x):
        x = self.trunk(x)
        answer = self.exit(x)
        return answer if self.takes("exit", answer.softmax(1).amax(1) >= 0.4) else self.rest(x)

def hasty():
    torch.manual_seed(team().rank)
    data = TensorDataset(torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3)
    how = Training(epochs=2, learning_rate=0.1, batch_size=8)
    return train(Hasty(), how, Context(torch.zeros(1, 6), loader(data, 8, 0), 0, {})).state_dict()

def fit(checkpoint=None):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(24, 6, generator=generator), torch.arange(24) % 3
    data = TensorDataset(inputs, labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    training = Training(epochs=3, learning_rate=0.1, batch_size=8, optimizer="sgd", orthonormal=0.01, average=0.5)
    lines = []
    train(model, training, Context(torch.zeros(1, 6), loader(data, 8, 0), 0, {}), lines.append, checkpoint=checkpoint,
          held_out=data)
    return {"lines": lines, **model.state_dict()}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.save({"size": team().size, "hasty": hasty(), **fit(folder / "epoch.pt")}, folder / f"{team().rank}.pt")
    train_only(folder / "recipe.toml", folder / "made", log=lambda line: print(line, flush=True))
"""


def test_two_processes_come_to_what_one_does(tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    recipe(tmp_path / "recipe.toml", f"train = {{ {ALL.replace('epochs = 3', 'epochs = 2')} }}")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, *launch, *options, script, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["size"] == second["size"] == 2
    namespace = {"__name__": "alone"}
    exec(compile(TOGETHER, "together", "exec"), namespace)
    alone = namespace["fit"]()
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], alone[name], atol=1e-6)
    assert first["lines"] == second["lines"] == alone["lines"]
    assert all(torch.equal(value, second["hasty"][name]) for name, value in first["hasty"].items())
    # With batch norm, whose statistics are those of each share, they come to one network, told and written once.
    assert done.stdout.count("epoch 2 of 2") == 1
    assert evaluate(tmp_path / "made").quality.measured is not None
    assert not (tmp_path / "made" / KEPT).exists()


def test_several_processes_need_accelerate(monkeypatch):
    from micronet_eval import parallel

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match=r"pip install 'micronet-eval\[train\]'"):
        parallel.team.__wrapped__()


def test_the_shares_of_a_batch_are_the_batch():
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    teams = [Team(torch.device("cpu"), rank, 4) for rank in range(4)]
    shares = [[labels.tolist() for _, labels in loader(data, 7, 1, team)] for team in teams]
    whole = [labels.tolist() for _, labels in loader(data, 7, 1)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert {len(part) for part in parts} == {-(-len(batch) // 4)}
        assert sorted({i for part in parts for i in part}) == sorted(batch)


# --- batches, layouts, precision --------------------------------------------------------------------------------------


def test_batches_are_those_of_torch_in_every_epoch():
    inputs, labels = torch.randn(23, 3), torch.arange(23)
    data = Subset(Subset(TensorDataset(inputs, labels), range(22, 2, -1)), [3, 1, 19, 7, 5, 11])
    order = torch.Generator().manual_seed(4)
    expected = DataLoader(data, 4, shuffle=True, generator=order)
    made = loader(data, 4, 4)
    for _ in range(2):  # epochs
        for (x, y), (want_x, want_y) in zip(made, expected, strict=True):
            assert torch.equal(x, want_x)
            assert torch.equal(y, want_y)
    assert len(made) == 2


class Hasty(Conditional):
    """A network on images whose examples leave at the exit; the rest views its activations."""

    paths = ("exit", "full")

    def __init__(self):
        super().__init__()
        self.exit, self.rest = nn.Linear(3, 3), nn.Sequential(Viewing(), nn.Linear(3 * 16 * 16, 3))

    def run(self, x):
        answer = self.exit(x.mean((2, 3)))
        return answer if self.takes("exit", answer.softmax(1).amax(1) >= 0) else self.rest(x)


def test_channels_come_last_where_no_path_minds():
    assert not takes_channels_last(Hasty(), torch.zeros(1, 3, 16, 16))


class Conv(nn.Sequential):
    def __init__(self, *head):
        first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        super().__init__(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), *head)


class Viewing(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def fit(options, head=None, **more):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(32, 1, 16, 16, generator=generator), torch.arange(32) % 3
    torch.manual_seed(0)
    model = Conv(head or nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    context = Context(inputs[:1], loader(TensorDataset(inputs, labels), 8, 0), 0, {})
    seen = []
    model[0].register_forward_hook(lambda m, x, y: seen.append((y.dtype, x[0].is_contiguous())) if m.training else None)
    made = train(model, Training(epochs=2, learning_rate=0.01, **options), context, **more)
    return made, seen


def test_channels_come_last_where_images_are_large_and_the_network_can(monkeypatch):
    example = torch.zeros(1, 1, 16, 16)
    assert takes_channels_last(Conv(nn.Flatten()), example)
    assert not takes_channels_last(Conv(Viewing()), example)
    assert not takes_channels_last(Conv(nn.Flatten()), torch.zeros(1, 1, 15, 16))
    made, _ = fit({})
    assert all(p.is_contiguous() for p in made.parameters())
    monkeypatch.setattr(training, "SMALL", 17)
    plain, _ = fit({})
    monkeypatch.undo()
    for name, value in made.state_dict().items():
        assert torch.allclose(value, plain.state_dict()[name], atol=1e-3), name
    fit({}, Viewing())


def test_a_teacher_that_cannot_have_channels_last_is_not_given_them():
    data = TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 3)
    context = Context(data[0][0][None], loader(data, 8, 0), 0, {})
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    assert takes_channels_last(model, context.example_input)
    teacher = nn.Sequential(Viewing(), nn.Linear(3 * 16 * 16, 3))
    train(model, Training(epochs=1, learning_rate=0.01, distill={}), context, teacher=teacher)


def test_bf16_multiplies_in_bfloat16_and_learns_at_32_bits():
    made, seen = fit({"precision": "bf16"})
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in made.parameters())
    plain, seen = fit({})
    assert {dtype for dtype, _ in seen} == {torch.float32}
    for name, value in plain.named_parameters():
        assert torch.allclose(value, made.state_dict()[name], atol=0.05), name
        assert not torch.equal(value, made.state_dict()[name])


def test_looking_at_what_is_held_out_changes_nothing():
    options = {"mixup": 0.5, "average": 0.5, "flip": True}
    one, _ = fit(options)
    held_out = TensorDataset(torch.randn(300, 1, 16, 16), torch.zeros(300, dtype=torch.int64))
    lines = []
    two, _ = fit(options, held_out=held_out, log=lines.append)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    right = (two(held_out.tensors[0]).argmax(1) == 0).float().mean().item()
    assert float(re.search(r"([\d.]+)% held out", lines[-1])[1]) == pytest.approx(100 * right, abs=0.01)


# --- ShakeDrop --------------------------------------------------------------------------------------------------------


def test_probabilities_fall_along_the_depth():
    assert keeps(4, 0.5) == [0.875, 0.75, 0.625, 0.5]
    assert keeps(3, 1.0) == [1, 1, 1]


def test_shake_drop_keeps_the_mean_and_shakes_gradients_otherwise():
    torch.manual_seed(0)
    shake = ShakeDrop(0.5)
    x = torch.ones(2, 3, 1, 1, requires_grad=True)
    forward, backward = [], []
    for _ in range(3000):
        y = shake(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        forward.append(y.detach()[:, :, 0, 0])
        backward.append(gradient[:, :, 0, 0])
    outputs, gradients = torch.stack(forward), torch.stack(backward)
    assert torch.equal(outputs[:, :, 0], outputs[:, :, 2])  # an example has one factor
    left = (outputs == 2).all((1, 2))  # b = 1: the branch as it is, divided by its probability
    assert left.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert (gradients[left] == 2).all()
    # b = 0: -1 ... 1 forward and 0 ... 1 backward, both divided by one half; the mean over all is 1, and 1 / 2 more.
    for values, low, high, mean in ((outputs, -2, 2, 1.0), (gradients, 0, 2, 1.5)):
        shaken = values[~left]
        assert low <= shaken.min() < low + 0.05
        assert high - 0.05 < shaken.max() <= high
        assert values.mean().item() == pytest.approx(mean, abs=0.05)
    assert not torch.equal(outputs[~left][:, 0], outputs[~left][:, 1])
    assert shake.eval()(x) is x


def test_shake_drop_costs_nothing_in_inference():
    options = {"depth": 20, "alpha": 24, "classes": 10, "channels": 1, "pool": 2}
    with_it, without = pyramidnet(**options, shake_drop=0.5).eval(), pyramidnet(**options).eval()
    assert with_it.state_dict().keys() == without.state_dict().keys()
    example = torch.zeros(1, 1, 8, 8)
    costs = [account(trace(model, example), plugins.formulas()) for model in (with_it, without)]
    assert costs[0] == costs[1]
    kept = [module.keep for module in with_it.modules() if isinstance(module, ShakeDrop)]
    assert kept == pytest.approx([11 / 12, 10 / 12, 9 / 12, 8 / 12, 7 / 12, 6 / 12])
    with pytest.raises(ValueError, match="above 0"):
        pyramidnet(**options, shake_drop=0.0)
