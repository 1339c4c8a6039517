"""The rows of the table of speed: what is measured, against what, and the target."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import counting
from benchmarks.clock import ROUNDS, medians, processes, ratio, side_by_side

ROOT = Path(__file__).parent.parent

Target = tuple[str, float, float, str]
"""What is compared, what was measured, the target, and "at most" or "at least"."""


def from_a_process(*arguments: str, **environment: str) -> Any:
    """What Python prints last when it is run with these arguments, in JSON."""
    command, variables = [sys.executable, *arguments], {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""glibc does not give memory back while a process runs. Else it does so, or not, by where the last tensor happens to
lie, and a network is up to a fifth slower that asks for it again and again."""


def count() -> dict[str, Any]:
    """Full score of four models against every counter, a forward, and a forward on the meta device."""
    found: dict[str, Any] = {"models": {}, "targets": []}
    for name in counting.MODELS:
        found["models"][name], targets = count_model(name)
        found["targets"] += targets
    return found


def count_model(name: str) -> tuple[dict[str, Any], list[Target]]:
    """Seconds and MACs of every counter on one model, and the targets; each is raced with ours in its own process."""
    told: dict[str, Any] = {"seconds": {counting.OURS: []}, "macs": {}, "failed": [], "missing": []}
    ratios: dict[str, float] = {}
    for other in counting.OTHERS:
        command = f"from benchmarks.counting import race; print(race({name!r}, {other!r}))"
        found = from_a_process("-c", command)
        if found is None:
            told["missing"].append(other)
            continue
        told["macs"] |= found["macs"]
        if other not in found["seconds"]:
            told["failed"].append(other)
            continue
        ratios[other] = ratio(found["seconds"], counting.OURS, other)
        told["seconds"][counting.OURS] += found["seconds"][counting.OURS]
        told["seconds"][other] = found["seconds"][other]
    told["seconds"] = medians(told["seconds"])
    fastest = max(ratios.keys() - {counting.FORWARD, counting.META}, key=lambda other: ratios[other])
    wanted = {f"the fastest, {fastest}": (fastest, 1.0), counting.META: (counting.META, 1.5)}
    if counting.FVCORE in ratios:
        wanted = {counting.FVCORE: (counting.FVCORE, 0.3), **wanted}
    print(name, told, ratios, flush=True)
    return told, [(f"{name}: {what}", ratios[other], limit, "at most") for what, (other, limit) in wanted.items()]


def process() -> dict[str, Any]:
    """The command as a whole process against `import torch`."""
    command = [sys.executable, "-c", "from micronet_eval.cli import command; command()"]
    torch = "python -c 'import torch'"
    seconds = processes(
        {
            torch: [sys.executable, "-c", "import torch"],
            "micronet-eval --help": [*command, "--help"],
            "micronet-eval submissions/3": [*command, str(ROOT / "submissions" / "3")],
        }
    )
    targets = [
        (
            "micronet-eval submissions/3: import torch",
            ratio(seconds, "micronet-eval submissions/3", torch),
            1.6,
            "at most",
        ),
        ("micronet-eval --help: import torch", ratio(seconds, "micronet-eval --help", torch), 0.15, "at most"),
    ]
    return {"seconds": medians(seconds), "targets": targets}


def linear() -> dict[str, Any]:
    """Time against the number of operations: the exponent of a fit."""
    import torch
    from torch import nn

    from micronet_eval import score

    x = torch.zeros(1, 4, 8, 8)
    times = {}
    for operations in (1_000, 3_000, 10_000, 30_000):
        layers = [layer for _ in range(operations // 2) for layer in (nn.Conv2d(4, 4, 1), nn.ReLU())]
        model = nn.Sequential(*layers).eval()
        seconds = side_by_side({"score": lambda model=model: score(model, x)}, rounds=3)["score"]
        times[operations] = float(f"{min(seconds):.4g}")
        print(operations, times[operations], flush=True)
    points = [(math.log(n), math.log(t)) for n, t in times.items()]
    middle = [sum(p[i] for p in points) / len(points) for i in (0, 1)]
    slope = sum((a - middle[0]) * (b - middle[1]) for a, b in points) / sum((a - middle[0]) ** 2 for a, _ in points)
    return {"seconds": times, "targets": [("exponent, 1,000 to 30,000 operations", slope, 1.05, "at most")]}


LLAMA = """
import json, resource, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                     num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)
with torch.device("meta"):
    model = LlamaForCausalLM(config).eval()
from micronet_eval import score
start = time.process_time()
report = score(model, torch.zeros(1, 4096, dtype=torch.int64))
seconds = time.process_time() - start
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": seconds, "GiB": memory, "parameters": report.storage.parameters,
                  "macs": report.math.macs, "operations": report.coverage.executed}))
"""


def llama() -> dict[str, Any]:
    """A transformer of 70 billion parameters on the meta device, context 4,096, in a process of its own."""
    found = from_a_process("-c", LLAMA)
    targets = [
        ("seconds, 70 billion parameters", found["seconds"], 20.0, "at most"),
        ("GiB resident, 70 billion parameters", found["GiB"], 1.5, "at most"),
    ]
    return {**found, "targets": targets}


def packing() -> dict[str, Any]:
    """Pack and unpack 100 MB of weights, 9 bits, 45 % of them zero, against numpy.packbits and zlib level 1."""
    import numpy as np
    import torch
    from torch import nn
    from torch.nn.utils import parametrize

    from micronet_eval.formats import FixedPoint, of_weights
    from micronet_eval.packing import pack, unpack
    from micronet_eval.structure import without_weights

    size = 5_000
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-255, 256, (size, size), generator=generator)
    codes[torch.rand(size, size, generator=generator) < 0.45] = 0
    model = nn.Sequential(nn.Linear(size, size, bias=False)).eval()
    model[0].weight = nn.Parameter(codes * 2.0**-8)
    quantizer = of_weights(FixedPoint(9, -8))
    assert quantizer is not None
    parametrize.register_parametrization(model[0], "weight", quantizer, unsafe=True)
    plain = (codes & 511).numpy().astype(np.uint16).reshape(-1)

    def architecture() -> nn.Module:
        with without_weights():
            return nn.Sequential(nn.Linear(size, size, bias=False))

    kept: dict[str, Any] = {}

    def ours_pack() -> None:
        kept["packed"] = pack(model, architecture(), torch.zeros(1, size))

    def ours_unpack() -> None:
        kept["model"] = unpack(kept["packed"], architecture())

    def plain_pack() -> None:
        bits = (plain[:, None] >> np.arange(9, dtype=np.uint16)) & 1
        kept["plain"] = zlib.compress(np.packbits(bits.astype(np.uint8)).tobytes(), 1)

    def plain_unpack() -> None:
        bits = np.unpackbits(np.frombuffer(zlib.decompress(kept["plain"]), np.uint8), count=9 * plain.size)
        kept["codes"] = (bits.reshape(-1, 9).astype(np.uint16) << np.arange(9, dtype=np.uint16)).sum(1, dtype=np.uint16)

    seconds = side_by_side(
        {"pack": ours_pack, "unpack": ours_unpack, "packbits + zlib 1": plain_pack, "the inverse": plain_unpack}
    )
    assert torch.equal(kept["model"][0].weight, model[0].weight) and np.array_equal(kept["codes"], plain)
    megabytes = 4 * size * size / 1e6
    middle = medians(seconds)
    targets = [
        ("pack: packbits + zlib 1", ratio(seconds, "pack", "packbits + zlib 1"), 1.0, "at most"),
        ("unpack: the inverse", ratio(seconds, "unpack", "the inverse"), 1.0, "at most"),
        ("pack, MB/s of float32", megabytes / middle["pack"], 200.0, "at least"),
        ("unpack, MB/s of float32", megabytes / middle["unpack"], 200.0, "at least"),
    ]
    sizes = {"ours": sum(s.size for s in kept["packed"].streams.values()), "packbits + zlib 1": len(kept["plain"])}
    return {"seconds": middle, "bytes": sizes, "targets": targets}


def nonzeros() -> dict[str, Any]:
    """Trace, non-zero count and storage of 1 GB of float32, dense and half zeros, against torch.count_nonzero."""
    import torch
    from torch import nn

    from micronet_eval.plugins import formulas
    from micronet_eval.scoring import account
    from micronet_eval.trace import trace

    size, x = 8_192, torch.zeros(1, 8_192)
    some = torch.rand(size, generator=torch.Generator().manual_seed(0)) + 0.1
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(4))).eval()
    for layer in model:
        layer.weight = nn.Parameter(some.expand(size, size).clone())
    priced = formulas()

    def ours() -> int:
        return account(trace(model, x), priced).storage.nonzeros

    def torchs() -> int:
        return sum(int(torch.count_nonzero(p)) for p in model.parameters())

    dense = side_by_side({"ours": ours, "count_nonzero": torchs})
    assert ours() == torchs()
    with torch.no_grad():
        for layer in model:
            layer.weight.view(-1)[::2] = 0
    sparse = side_by_side({"ours": ours, "count_nonzero": torchs})
    assert ours() == torchs()
    targets = [("dense: count_nonzero", ratio(dense, "ours", "count_nonzero"), 1.1, "at most")]
    shown = {"dense": medians(dense), "every other value zero, smallest mask found": medians(sparse)}
    return {"seconds": shown, "targets": targets}


def quality() -> dict[str, Any]:
    """Quality of fake-quantized networks on test sets, against the same networks in floating point."""
    shown, targets = {}, []
    for name, task, many in (("digits", "digits", ROUNDS), ("fashion-small", "fashion-mnist", 1)):
        seconds: dict[str, list[float]] = {}
        ratios = []
        for _ in range(many):
            command = f"from benchmarks.rows import quality_of; print(quality_of({name!r}, {task!r}))"
            found = from_a_process("-c", command, **KEEPS_MEMORY)
            ratios.append(ratio(found, "fake-quantized", "float"))
            for which, each in found.items():
                seconds.setdefault(which, []).extend(each)
        shown[name] = medians(seconds)
        targets.append((f"{name}, CPU: float", median(ratios), 1.3, "at most"))
    return {"seconds": shown, "targets": targets}


def quality_of(name: str, task: str) -> str:
    """Seconds of a submission on the test set of its task, fake-quantized and in floating point, as JSON."""
    from collections import Counter

    import torch
    from torch import nn
    from torch.nn.utils import parametrize

    from micronet_eval import plugins
    from micronet_eval.formats import ActivationQuantizer
    from micronet_eval.opening import open_submission
    from micronet_eval.quality import count_correct

    folder = ROOT / "submissions" / name
    quantized, plain = open_submission(folder).model, open_submission(folder).model
    for module in list(plain.modules()):
        if parametrize.is_parametrized(module):
            for tensor in list(module.parametrizations):
                parametrize.remove_parametrizations(module, tensor)
        for child_name, child in list(module.named_children()):
            if isinstance(child, ActivationQuantizer):
                setattr(module, child_name, nn.Identity())
    data = plugins.lookup("task", task).dataset(None, "test")

    def run(model: nn.Module) -> None:
        with torch.inference_mode(), parametrize.cached():  # as quality.measure does
            count_correct(model, data, None, Counter())

    return json.dumps(side_by_side({"fake-quantized": lambda: run(quantized), "float": lambda: run(plain)}))


def compare() -> dict[str, Any]:
    """64 jobs on 2 processes, against half the sum of the jobs' own times; by the clock on the wall.

    What all strategies begin with is trained once for each seed, and is in no job's own time: it is added to the sum.
    """
    from benchmarks.killed import BASE
    from micronet_eval import compare as compared
    from micronet_eval import compress

    folder, seeds = ROOT / "submissions" / "digits", 8
    manifest = (folder / "submission.toml").read_text()
    found: dict[str, Any] = {"seconds": {}, "targets": []}
    with tempfile.TemporaryDirectory() as place:
        copies = [Path(place) / f"{number}" for number in range(64)]
        for copy in copies:
            copy.mkdir()
            (copy / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
            (copy / "submission.toml").write_text(f"# {copy.name}\n{manifest}")
        base = Path(place) / "base.toml"
        base.write_text(BASE)
        for number in range(2):  # the first imports what it needs
            start = time.perf_counter()
            compress(base, Path(place) / f"base {number}")
            training = time.perf_counter() - start
        strategies = {"on": base, "sparsifiers": "magnitude:sparsity=0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9", "seeds": seeds}
        kinds: dict[str, tuple[Callable[[Path], Any], float]] = {
            "8 strategies, 8 seeds, 8 epochs behind each": (
                lambda results: compared(
                    **strategies, fine_tune={"epochs": 8, "learning_rate": 0.002}, results=results, workers=2
                ),
                training * seeds,
            ),
            "64 submissions, only evaluated": (lambda results: compared(*copies, results=results, workers=2), 0.0),
        }
        for number, (what, (run, before)) in enumerate(kinds.items()):
            start = time.perf_counter()
            done = run(Path(place) / f"{number}.sqlite")
            wall, own = time.perf_counter() - start, before + sum(result.seconds for result in done.results)
            if done.failed or len(done.results) != 64:
                raise RuntimeError(f"compare: {what}: a job failed")
            found["seconds"] |= {f"{what}, wall": wall, f"{what}, sum of the jobs": own}
            found["targets"].append((f"64 jobs, 2 processes: {what}: sum / 2", wall / (own / 2), 1.15, "at most"))
    return found


def eigendamage() -> dict[str, Any]:
    """One round of eigendamage, against a plain forward and backward over the same batches, each in its own process."""
    found: dict[str, Any] = {}
    targets: list[Target] = []
    for name in ("resnet-50", "pyramidnet-272"):
        for what in ("round", "plain"):
            found[f"{name}, {what}"] = from_a_process("-m", "benchmarks.eigendamage_round", name, what)
            print(name, what, found[f"{name}, {what}"], flush=True)
        one, other = found[f"{name}, round"], found[f"{name}, plain"]
        targets.append((f"{name}: time of a forward and backward", one["seconds"] / other["seconds"], 4.0, "at most"))
        targets.append((f"{name}: memory of a forward and backward", one["GiB"] / other["GiB"], 2.0, "at most"))
    return {"found": found, "targets": targets}


ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    "count": count,
    "process": process,
    "linear": linear,
    "llama": llama,
    "packing": packing,
    "nonzeros": nonzeros,
    "quality": quality,
    "compare": compare,
    "eigendamage": eigendamage,
}
