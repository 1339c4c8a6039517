"""What counting must not become: ratios, with bounds so generous that noise does not fail them, and imports."""

import itertools
import random
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torchvision.models import get_model

from benchmarks.page import page
from micronet_eval import nonzeros, score, shapes, storage
from micronet_eval.activation import activation_peak
from micronet_eval.costs import FORMULAS
from micronet_eval.formats import Plain
from micronet_eval.masks import block_mask, candidates, elements, mask_shape
from micronet_eval.merge import merged, merged_trace
from micronet_eval.scoring import account, by_module
from micronet_eval.shapes import RULES
from micronet_eval.trace import constant, trace

HEAVY = ("torch", "torchvision", "sklearn", "plotly", "numpy", "pandas")


# --- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["import micronet_eval", "from micronet_eval.cli import main; main()"])
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    watch = f"import sys, atexit; sys.argv = ['micronet-eval', '--help']; " \
        f"atexit.register(lambda: print('heavy:', *(m for m in {HEAVY} if m in sys.modules)))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", f"{watch}\n{code}"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["heavy:"]


def test_counting_does_not_import_torchs_compiler():
    """It takes as long to import as torch itself; neither does a fixed-point quantizer."""
    code = """
import sys, torch
from torch import nn
from micronet_eval import score
from micronet_eval.formats import FixedPointQuantizer
before = set(sys.modules)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), FixedPointQuantizer(8), nn.ReLU(),
                      nn.AvgPool2d(2, ceil_mode=True)).eval()
score(model, torch.zeros(1, 3, 8, 8))
model[2](torch.ones(1))
print(*(m for m in ("torch._dynamo", "torch._inductor", "sympy", "fvcore") if m in set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_nothing_is_printed_at_the_end_where_triton_was_loaded():
    pytest.importorskip("triton")
    code = "import sys, triton; sys.argv = ['micronet-eval', 'tasks']; from micronet_eval.cli import command; command()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("words", "status"), [(["tasks"], 0), (["evaluate", "missing"], 2), (["--nonsense"], 2)])
def test_the_command_ends_without_taking_everything_apart(words, status, tmp_path):
    """Yet what is registered to run at the end does run, and all output arrives."""
    code = f"""
import atexit, sys
sys.argv = ["micronet-eval", *{words}]
from micronet_eval.cli import command
class Kept:
    def __del__(self): print("taken apart", flush=True)
kept = Kept()
try:
    command()
finally:
    atexit.register(print, "the end", flush=True)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == status
    assert bool(done.stderr) == (status != 0) and "Traceback" not in done.stderr
    assert done.stdout.endswith("the end\n") and ("digits" in done.stdout) == (status == 0)


def test_an_error_of_our_own_is_told_at_the_end(tmp_path):
    code = "from micronet_eval import cli\ncli.main = lambda: 1 / 0\ncli.command()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


# --- ratios -----------------------------------------------------------------------------------------------------------


def seconds(run, rounds=3):
    run()
    found = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def test_a_score_takes_about_as_long_as_a_forward_on_the_meta_device():
    """The target is 1.5 of it; 4 for noise. It was 14 when the model was copied, merged, and traced twice."""
    x = torch.zeros(1, 3, 224, 224)
    model = get_model("resnet50").eval()
    with torch.device("meta"):
        meta, meta_x = get_model("resnet50").eval(), torch.zeros(1, 3, 224, 224)
    with torch.no_grad():
        floor = seconds(lambda: meta(meta_x))
    assert seconds(lambda: score(model, x)) < 4 * floor


def test_time_is_linear_in_the_number_of_operations():
    def of(operations):
        model = nn.Sequential(*(layer for _ in range(operations // 2) for layer in (nn.Linear(4, 4), nn.ReLU())))
        return seconds(lambda: score(model.eval(), torch.zeros(1, 4)), rounds=2)

    assert of(4_000) < 16 * of(500)  # 8 where it is linear, 64 where it is quadratic


# --- own shapes -------------------------------------------------------------------------------------------------------


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


class Draw:
    """Random arguments for an operation: sizes of 1 among them, other orders of memory, now and then other dtypes."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def shape(self, least, most):
        return [self.random.choice([1, 1, 2, 3, 4, 6]) for _ in range(self.random.randint(least, most))]

    def tensor(self, *shape):
        dtype = torch.float32 if self.random.random() < 0.9 else torch.float64
        if self.random.random() < 0.7:
            return meta(*shape, dtype=dtype)
        order = list(range(len(shape)))
        self.random.shuffle(order)
        return meta(*(shape[i] for i in order), dtype=dtype).permute([order.index(i) for i in range(len(order))])

    def maybe(self, tensor):
        return self.random.choice([tensor, None])

    def arguments(self, func):
        pick, name = self.random.choice, func._schema.name.removeprefix("aten::")
        if name == "convolution":
            dims, groups = pick([1, 2, 3]), pick([1, 1, 2, 3])
            channels, outputs = groups * pick([1, 2]), groups * pick([1, 2])
            x = self.tensor(pick([1, 2]), channels, *(pick([1, 3, 5, 6]) for _ in range(dims)))
            weight = self.tensor(outputs, channels // groups, *(pick([1, 2, 3]) for _ in range(dims)))
            stride, padding, dilation = ([pick(sizes) for _ in range(dims)] for sizes in ([1, 2], [0, 1], [1, 1, 2]))
            return x, weight, self.maybe(meta(outputs)), stride, padding, dilation, False, [0] * dims, groups
        if "pool2d" in name:
            x = self.tensor(*self.shape(1, 2)[:1], 2, pick([4, 5, 9]), pick([4, 6, 7]))
            kernel, stride = pick([[2], [2, 3], [3]]), pick([[], [1], [2, 1]])
            return (
                x,
                kernel,
                stride,
                pick([[0], [1, 0]]),
                *([pick([[1], [2, 1]])] * (name[0] == "m")),
                pick([False, True]),
            )
        if name == "native_batch_norm":
            shape = self.shape(2, 5)
            of_channels = [meta(shape[1]) for _ in range(4)]
            return self.tensor(*shape), self.maybe(of_channels[0]), *of_channels[1:], False, 0.1, 1e-5
        if name == "native_layer_norm":
            shape = self.shape(1, 4)
            inner = shape[self.random.randrange(len(shape)) :]
            return self.tensor(*shape), inner, self.maybe(meta(*inner)), self.maybe(meta(*inner)), 1e-5
        if name == "native_group_norm":
            batch, channels, *rest = self.shape(2, 4)
            groups = pick([n for n in range(1, channels + 1) if channels % n == 0])
            size = torch.Size(rest).numel()
            return (
                self.tensor(batch, channels, *rest),
                meta(channels),
                meta(channels),
                batch,
                channels,
                size,
                groups,
                0.1,
            )
        if name in ("mm", "addmm", "bmm"):
            batch, m, k, n = self.shape(4, 4)
            if name == "bmm":
                return self.tensor(batch, m, k), self.tensor(batch, k, n)
            return *([pick([meta(n), meta(1), meta(m, n)])] * (name == "addmm")), self.tensor(m, k), self.tensor(k, n)
        if name == "mean":
            shape = self.shape(1, 5)
            dims = self.random.sample(range(-len(shape), 0), self.random.randint(1, len(shape)))
            return self.tensor(*shape), dims, pick([True, False])
        if "softmax" in name:
            shape = self.shape(1, 4)
            return (
                self.tensor(*shape),
                self.random.randrange(-len(shape), len(shape)),
                *([False] * (name == "_softmax")),
            )
        if name == "cat":
            shape = self.shape(1, 5)
            dim = self.random.randrange(len(shape))
            parts = [[*shape[:dim], pick([1, 2, 3]), *shape[dim + 1 :]] for _ in range(pick([1, 2, 3]))]
            return [self.tensor(*part) for part in parts], dim
        shape = self.shape(0, 5)
        if func._overloadname == "Tensor":
            smaller = [pick([n, n, 1]) for n in shape][pick([0, 0, len(shape) // 2]) :]
            both = [self.tensor(*shape), self.tensor(*smaller)]
            return both if name.endswith("_") or pick([True, False]) else both[::-1]
        return self.tensor(*shape), *([2.5] * (func._overloadname == "Scalar"))


def told(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset(), tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("func", RULES, ids=str)
def test_own_shapes_are_those_of_torch(func):
    draw, held = Draw(0), 0
    for _ in range(150):
        arguments = draw.arguments(func)
        own = RULES[func](*arguments)
        if own is None:
            continue
        held += 1
        torchs = func(*arguments)
        for one, other in zip(*([r] if isinstance(r, Tensor) else r for r in (own, torchs)), strict=True):
            assert told(one) == told(other), [told(a) if isinstance(a, Tensor) else a for a in arguments]
            assert (one is arguments[0]) == (other is arguments[0])
    assert held > 30


@pytest.mark.parametrize(
    ("func", "arguments"),
    [
        (torch.ops.aten.convolution.default, (meta(1, 3, 4), meta(8, 2, 1), None, [1], [0], [1], False, [0], 1)),
        (torch.ops.aten.convolution.default, (meta(1, 3, 2), meta(8, 3, 5), None, [1], [0], [1], False, [0], 1)),
        (torch.ops.aten.mm.default, (meta(2, 3), meta(4, 2))),
        (torch.ops.aten.addmm.default, (meta(7), meta(2, 3), meta(3, 2))),
        (torch.ops.aten.add.Tensor, (meta(2, 3), meta(4, 3))),
        (torch.ops.aten.add_.Tensor, (meta(1, 3), meta(4, 3))),
        (torch.ops.aten.cat.default, ([meta(2, 3), meta(2, 4)], 0)),
        (torch.ops.aten.mean.dim, (meta(2, 3), [2])),
        (torch.ops.aten._softmax.default, (meta(2, 3), 2, False)),
        (torch.ops.aten.native_layer_norm.default, (meta(2, 3), [4], None, None, 0.1)),
        (torch.ops.aten.native_batch_norm.default, (meta(2, 3), meta(4), None, meta(3), meta(3), False, 0.1, 0.1)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_left_to_torch(func, arguments):
    assert RULES[func](*arguments) is None


def test_what_torch_returned_for_one_layout_can_be_made_again():
    made = 0
    for func in RULES:
        draw = Draw(1)
        for _ in range(20):
            arguments = draw.arguments(func)
            if RULES[func](*arguments) is None:  # it may not fit
                continue
            result = func(*arguments)
            if shapes.geometry(func, arguments, {}) is not None and shapes.is_new(result):
                again = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
                assert told(again) == told(result)
                made += 1
    assert made > 200


def test_the_layout_is_all_that_the_result_depends_on():
    mul, view, relu_ = torch.ops.aten.mul.Tensor, torch.ops.aten.view.default, torch.ops.aten.relu_.default
    x, y = meta(2, 3), meta(3, 2).t()
    assert shapes.geometry(mul, (x, x), {}) == shapes.geometry(mul, (x, meta(2, 3)), {})
    keys = [shapes.geometry(mul, (x, other), {}) for other in (x, y, x.double(), 2, 2.0)]
    assert len(set(keys)) == len(keys)
    assert shapes.geometry(view, (x, [6]), {}) is None  # in the memory of x
    assert shapes.geometry(relu_, (x,), {}) is None
    assert not shapes.is_new(x[:1])
    assert not shapes.is_new(x.t()[1:])


# --- zeros ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool,
                                   torch.float8_e4m3fn])  # fmt: skip
def test_zeros_are_counted_in_every_dtype_and_order(dtype):
    plain = torch.zeros(7, 5, 3)
    plain[1, 2, 0], plain[6, 4, 2], plain[3, 0, 1] = 1, -1 if dtype != torch.bool else 1, -0.0
    tensor = plain.to(dtype)
    every_other = torch.zeros(300_001).to(dtype).float()
    every_other[::2] = 1
    assert nonzeros.seen(tensor).nonzeros == nonzeros.seen(tensor.transpose(0, 2)).nonzeros == 2
    assert nonzeros.seen(tensor[:, ::2]).nonzeros == 2
    assert nonzeros.seen(every_other.to(dtype)).nonzeros == 150_001
    assert nonzeros.by_output(tensor, 0).tolist() == [0, 1, 0, 0, 0, 0, 1]
    assert nonzeros.by_output(tensor.permute(2, 0, 1), -1).tolist() == [0, 0, 1, 0, 1]


def test_the_least_magnitude():
    values = torch.full((300_000,), -3.0)
    values[299_999] = 1e-40
    assert nonzeros.seen_closely(values).least == pytest.approx(1e-40, rel=1e-3)
    values[200_000:] = 0
    assert nonzeros.seen_closely(values).least == nonzeros.seen_closely(values.to(torch.bfloat16)).least == 3
    assert nonzeros.seen_closely(torch.zeros(3)).least == float("inf")
    values[0] = float("nan")
    assert not nonzeros.seen_closely(values).least > 0


@pytest.mark.parametrize("number", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_seen(number):
    values = torch.full((300_000,), 1e30)  # the squares overflow
    values[299_000:] = 0
    assert nonzeros.seen(values) == nonzeros.Seen(299_000, True)
    assert nonzeros.seen_closely(values) == nonzeros.Seen(299_000, True, pytest.approx(1e30))
    values[250_000] = number
    assert nonzeros.seen(values) == nonzeros.Seen(299_000, False)
    closely = nonzeros.seen_closely(values)
    assert (closely.nonzeros, closely.finite) == (299_000, False)


@pytest.mark.parametrize("many", [1, 1 << 16])
def test_the_smallest_mask_is_that_of_trying_all(many, monkeypatch):
    """Whatever is told from a part of a tensor, or from other blocks."""
    monkeypatch.setattr(storage, "_MANY", many)
    draw, found = random.Random(0), set()
    torch.manual_seed(0)
    for _ in range(300):
        shape = [draw.choice([1, 3, 4, 16, 17, 40]) for _ in range(draw.randint(1, 4))]
        block = draw.choice([(1, 1), (1, 4), (4, 1), (2, 2), (16, 16)])
        tensor = torch.randn(shape)
        zero = torch.rand(mask_shape(shape, block)) < draw.choice([0.1, 0.5, 0.9, 1])
        tensor[torch.from_numpy(elements(zero.numpy(), block, shape))] = 0
        stored = storage.Stored("", constant(tensor), Plain("float32"), False)
        for width in (1, 9, 32):
            sizes = {None: width * tensor.numel()}
            for each in ((1, 1), *candidates(tuple(shape))):
                mask = block_mask(tensor.numpy() != 0, each)
                sizes[each] = int(elements(mask, each, shape).sum()) * width + mask.size
            best = min(sizes, key=sizes.get)
            assert stored.mask(width, stored.format) == best
            found.add(best)
    assert len(found) > 5


class Reading(TorchDispatchMode):
    """How many elements operations read."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.elements += sum(item.numel() for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor))
        return func(*args, **(kwargs or {}))


class Attends(nn.Module):
    """Each layer makes the same causal mask, as those of transformers do."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for _ in range(self.layers):
            x = x + torch.where(torch.ones(x.shape, dtype=torch.bool).tril(), 0.0, float("-inf"))
        return x


def test_a_mask_that_each_layer_makes_alike_is_looked_at_once():
    def read(layers):
        recorded = trace(Attends(layers), torch.zeros(64, 64))
        with Reading() as reading:
            assert [s.value.shape for s in storage.stored_tensors(recorded)] == [(64, 64)]
        return reading.elements

    assert read(16) == read(1)


def test_weights_that_are_computed_are_not_sorted(monkeypatch):
    """Whether they are signs shows in the first elements; those of a masked network would be sorted again and again."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.5)
    monkeypatch.setattr(torch, "unique", None)
    assert score(model, torch.zeros(1, 4, 8, 8)).storage.nonzeros == (4 + 8) * 8 * 9 // 2 + 16


# --- merged in the trace ----------------------------------------------------------------------------------------------


def told_of(recorded):
    counted = account(recorded, FORMULAS)
    stored = [(s.name, s.format, s.elements, s.nonzeros) for s in counted.stored]
    memory = [(op.name, op.module, [(v.shape, recorded.buffers[v].bytes) for v in (*op.inputs, *op.outputs)])
              for op in recorded.ops]  # fmt: skip
    peak = activation_peak(recorded, counted.widths)
    return counted, stored, memory, peak, by_module(counted, FORMULAS)


class Spread(nn.Module):
    """A batch norm behind one convolution, one behind a sum, one in front of a convolution, one that runs twice."""

    def __init__(self, padding=0):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 2 * padding + 1, padding=padding)
        self.behind, self.alone, self.before, self.twice = (nn.BatchNorm2d(8) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.behind(self.first(x)))
        y = self.twice(x + 1)
        return self.twice(self.alone(x + y)) + self.second(self.before(x))


def wild(model, seed=0):
    """Statistics of any sign; with a seed scales that are zero, or make what they scale zero, and zero weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
                module.bias.normal_()
                module.weight[0], module.weight[1] = (0, 1e-44) if seed else (1, 1)
            elif isinstance(module, nn.Conv2d) and seed:
                module.weight.view(-1)[::3] = 0
                module.weight.view(-1)[1::3] *= 1e-20
    return model.eval()


@pytest.mark.parametrize(("padding", "seed"), [*itertools.product([0, 1], [0, 1])])
def test_the_trace_without_batch_norm_is_that_of_the_merged_model(padding, seed):
    model, x = wild(Spread(padding), seed), torch.zeros(1, 3, 8, 8)
    assert told_of(merged_trace(model, x)) == told_of(trace(merged(model, x), x))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_layer_that_takes_the_norm_in_front_and_the_norm_behind(seed):
    """Where the norm behind shifts nothing, a bias is zero or not by what the norm in front shifts."""
    layers = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
    model, x = wild(nn.Sequential(*layers), seed), torch.zeros(1, 3, 8, 8)
    for tensor in (layers[0].weight, layers[2].bias, layers[2].running_mean):
        tensor.data.zero_()
    assert told_of(merged_trace(model, x)) == told_of(trace(merged(model, x), x))
    layers[0].weight.data[1:] = 1
    layers[0].bias.data.zero_()
    assert told_of(merged_trace(model, x)) == told_of(trace(merged(model, x), x))


def test_a_narrow_weight_that_underflows_when_it_is_merged():
    """2**-14 * 2**-12 is 2**-26, which half precision rounds to 0; 3 of 4 weights stay."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4, eps=0)).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].weight[2] = 2.0**-14
        model[1].running_var.fill_(2.0**15)
        model[1].weight.fill_(2.0**-5)  # divided by the root of 2**15
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    assert told_of(merged_trace(model, x)) == told_of(trace(merged(model, x), x))
    assert score(model, x).storage.nonzeros == 3  # and biases of zero


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "googlenet", "shufflenet_v2_x0_5"])
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_the_same_for_models_of_torchvision(name):
    torch.manual_seed(0)
    model, x = get_model(name).eval(), torch.zeros(1, 3, 224, 224)
    assert told_of(merged_trace(model, x)) == told_of(trace(merged(model, x), x))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_of_the_documentation_is_that_of_the_results():
    import json

    from benchmarks.__main__ import PAGE, RESULTS

    assert PAGE.read_text() == page(json.loads(RESULTS.read_text()))


def test_a_missed_target_is_told():
    environment = dict.fromkeys(("date", "commit", "processor", "threads", "python", "torch"), "")
    targets = [("a: b", 2.0, 1.5, "at most"), ("c", 3.0, 2.0, "at least")]
    row = {"environment": environment, "seconds": {"ours": 2.0}, "targets": targets}
    shown = page({"quality": row})
    assert "| a: b | 2 | at most 1.5 | **missed** |" in shown
    assert "| c | 3 | at least 2 | met |" in shown
    assert "A round of eigendamage | not measured" in shown
