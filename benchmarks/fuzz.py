"""Feeds damaged and malicious inputs to everything that reads what strangers write.

python -m benchmarks.fuzz                     all; writes results/fuzz.json
python -m benchmarks.fuzz packed              one target; writes its runs there
python -m benchmarks.fuzz packed 5000         one target, so many inputs an engine; writes nothing

Every target takes bytes. They say how a valid input is to be damaged, so the same targets serve three engines: seeded
random bytes, hypothesis (which shrinks what it finds) and, where it is installed, atheris (which looks for inputs that
reach new code). A finding is any exception but those that the reader documents, more than SECONDS for one input, or an
input that is accepted although it does not mean what it says.
"""

from __future__ import annotations

import json
import math
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from micronet_eval import packing, plugins
from micronet_eval.comparing import options, parse
from micronet_eval.comparing.grid import Cell, jobs_of
from micronet_eval.comparing.jobs import Job
from micronet_eval.errors import InputError, hidden
from micronet_eval.formats import FixedPointQuantizer
from micronet_eval.formats.number import OffGrid, format_of
from micronet_eval.graph import Graph, graph_of, model_of
from micronet_eval.isolation import Limits
from micronet_eval.recipe import Recipe, configured, named_stages, strategy_of
from micronet_eval.storage import stored_tensors, without_values
from micronet_eval.structure import StructureError, set_accumulators, set_quantizers, traced
from micronet_eval.submission import Manifest, manifest_bytes, read_toml
from micronet_eval.targets import example
from micronet_eval.trace import trace

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
SECONDS = 10
RANDOM = {
    "limits": 60_000, "input": 60_000, "format": 50_000, "graph": 40_000, "manifest": 20_000, "recipe": 10_000,
    "strategy": 60_000, "packed": 3_000,
}  # fmt: skip
"""Seeded random inputs of each target: more where one takes little time."""
OTHERS = {"hypothesis": 500, "atheris": 2_000}
"""Inputs of each target with the other engines."""

MANIFEST = b"""name = "small"
task = "digits"
authors = ["one", "two"]
[architecture]
name = "wide-resnet"
depth = 10
width = 1
[claims]
storage = 4_761
score = 0.03059
quality = 0.9955
[paths]
exit = 0.3
full = 0.7
[frequencies]
clusters = [0.5, 0.25, 0.25]
[provenance]
note = "untrained"
data = "noise"
[[provenance.steps]]
stage = "train"
parameters = 10
nonzeros = 9
mults = 8
adds = 7
"""
STRATEGIES: dict[plugins.Kind, bytes] = {
    "pruner": b"magnitude:ratio=0.5,0.6,limit=0.9",
    "sparsifier": b"magnitude:sparsity=0.5,0.6,scope=lamp",
    "quantizer": b"fixed-point:weight_bits=4,8,activation_bits=8",
}
RECIPE = b"""task = "digits"
seed = 3
validation = 0.1
[submission]
name = "small"
authors = ["test"]
[architecture]
name = "wide-resnet"
depth = 10
[[stages]]
train = { epochs = 3, learning_rate = 0.01, schedule = "step", distill = { weight = 0.5 } }
[[stages]]
pruner = "low-rank"
parameters = 40_000
[[stages]]
sparsifier = "magnitude"
sparsity = 0.5
[[stages]]
statistics = { batches = 1 }
[[stages]]
merge = "batch-norm"
[[stages]]
[stages.rounds]
times = 2
quality = 0.9
until = { score = 0.5 }
[[stages.rounds.stages]]
quantizer = "fixed-point"
weight_bits = 5
"""
WORDS = [
    *b"\x00 \x1b \xff \xc3\xa9 \xe2\x80\xae [ ] { } = . , : \" ' # - 0 1 9 e E inf nan true false".split(b" "),
    b"\n", b"\\u202e", b"[[", b"]]", b"{}", b"[]", b"1e999999999", b"-1", b"9" * 40, b"9" * 400, b"." * 120, b"0x1f",
    b"1979-05-27T07:32:00Z", b"a.b.c", b"null", b"signs:", b"affine:", b"codebook:", b"fixed-point:", b"float32",
    b":shifts", b"bitmask", b"blocks:2x2", b"plain", b"overhead", b"dense", b"0.weight", b"Linear", b"type", b"x" * 300,
    b"__class__", b"os.system", b"nodes", b"layers", b"node", b"tuple", b"slice", b"get_attr", b"call_function",
]  # fmt: skip


class Wrong(Exception):
    """An input was accepted although it does not mean what it says."""


def edited(seed: bytes, data: bytes) -> bytes:
    """`seed`, damaged as `data` says: four bytes are one edit. With an odd first byte of 255 `data` itself."""
    if data[:1] == b"\xff":
        return data[1:]
    text = bytearray(seed)
    for i in range(0, len(data) - 3, 4):
        kind, place, word = data[i] % 5, int.from_bytes(data[i + 1 : i + 3], "big"), data[i + 3]
        at, length = place % (len(text) + 1), 1 + word % 17
        if kind == 0:
            text[at:at] = WORDS[word % len(WORDS)]
        elif kind == 1:
            text[at : at + len(WORDS[word % len(WORDS)])] = WORDS[word % len(WORDS)]
        elif kind == 2:
            del text[at : at + length]
        elif kind == 3:
            text[at:at] = text[max(0, at - 2 * length) : at]
        else:
            text[at : at + 1] = bytes([word])
    return bytes(text)


# --- targets ----------------------------------------------------------------------------------------------------------


@cache
def _place() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def _file(name: str, data: bytes) -> Path:
    path = _place() / name
    path.write_bytes(data)
    return path


def _texts(item: Any) -> list[str]:
    if isinstance(item, dict):
        return [text for pair in item.items() for part in pair for text in _texts(part)]
    if isinstance(item, list):
        return [text for part in item for text in _texts(part)]
    return [item] if isinstance(item, str) else []


def manifest(data: bytes) -> None:
    """What is accepted has no hidden characters, shares that sum to one, and says the same when it is written anew."""
    try:
        found = read_toml(_file("submission.toml", edited(MANIFEST, data)), Manifest)
    except InputError as error:
        return _short(error)
    if any(hidden(letter) for text in _texts(found.model_dump()) for letter in text):
        raise Wrong("a hidden character")
    if found.frequencies is not None and sum(found.frequencies.shares) != 1:
        raise Wrong("the shares do not sum to one")
    if read_toml(_file("again.toml", manifest_bytes(found)), Manifest) != found:
        raise Wrong("it says something else when it is written anew")
    return None


def recipe(data: bytes) -> None:
    """Stages of accepted recipes have strategies that exist."""
    try:
        found = read_toml(_file("recipe.toml", edited(RECIPE, data)), Recipe)
        for name, stage in named_stages(found.stages):
            strategy_of(stage, name)
    except InputError as error:
        _short(error)


def strategy(data: bytes) -> None:
    """Texts of `compare --pruner`, each with --fine-tune. What is accepted is a recipe that says the same."""
    base = _place() / "base.toml"
    if not base.exists():
        base.write_bytes(RECIPE[: RECIPE.index(b"[[stages]]\n[stages.rounds]")])  # nothing goes behind a quantizer
    for kind, text in STRATEGIES.items():
        with suppress(InputError):
            cells = parse(kind, edited(text, data).decode("utf-8", "replace"))
            _says(jobs_of(cells[:3], base, 1, None, None, _place()), cells, -1)
    with suppress(InputError):
        given = options(edited(b"epochs=3,learning_rate=0.01,schedule=step", data).decode("utf-8", "replace"))
        _says(jobs_of(RANDOMLY, base, 1, given, None, _place()), RANDOMLY, -2 if given else -1)


RANDOMLY: list[Cell] = [(("sparsifier", "random", {"sparsity": 0.5}),)]


def _says(jobs: list[Job], cells: list[Cell], place: int) -> None:
    """Each job's recipe has at this place the strategy of its cell, and training behind it or none."""
    for job, ((kind, name, given),) in zip(jobs, cells, strict=False):
        try:
            stages = read_toml(_file("job.toml", job.recipe.encode()), Recipe).stages
        except InputError as error:
            raise Wrong(f"it is accepted, and its recipe is not: {error}") from error
        found = strategy_of(stages[place], "")
        if found != configured(kind, name, given, ""):
            raise Wrong(f"the recipe of {given} has {found}")
        numbers = [*vars(found).values(), *(vars(stages[-1].train).values() if stages[-1].train else ())]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise Wrong(f"a number that is none: {numbers}")


def limits(data: bytes) -> None:
    """Limits that are accepted are positive."""
    with suppress(InputError):
        found = Limits.parse(edited(b"memory=4G,cpu=60,wall=60,files=256,written=64M", data).decode("utf-8", "replace"))
        if min(vars(found).values()) <= 0:
            raise Wrong(f"{found}")


def input_shape(data: bytes) -> None:
    """Texts of `count --input`."""
    with suppress(InputError):
        example([edited(b"ids=1x16:int64", data).decode("utf-8", "replace")])


def number_format(data: bytes) -> None:
    """What a format reads from a stream it writes back: the same codes."""
    seed = (
        b"fixed-point:5",
        b"affine:-8:7:1x4:zeros",
        b"affine:-8:7:1x4:shifts",
        b"signs:affine:-1:1:4x4",
        b"codebook:5",
        b"signed:3:int8",
    )
    spec = edited(seed[data[0] % len(seed)] if data else b"", data[1:]).decode("utf-8", "replace")
    reader = packing._BitReader(np.frombuffer((data * 40)[:400], np.uint8))
    try:
        made = format_of(spec, (4, 4), lambda count, width: torch.from_numpy(reader.read(count, width)))
        codes = torch.from_numpy(reader.read(16, made.code_bits)).view(4, 4)
        value = made.decode(codes)
    except OffGrid:
        return
    if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
        return  # packing refuses it
    try:
        again = made.decode(made.encode(value))
    except OffGrid as error:
        raise Wrong(f"{spec}: it refuses what it made: {error}") from error
    if not torch.equal(again.float(), value.float()):
        raise Wrong(f"{spec}: {value} becomes {again}")


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


@cache
def _packed() -> tuple[dict[str, bytes], str]:
    """The streams and the structure of a small quantized, sparse network, which sums one layer in 8 bits."""
    torch.manual_seed(0)
    model, shape = _network(), torch.zeros(1, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 8).round() / 8)
            parameter[parameter.abs() < 0.2] = 0
    model = traced(model)
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        for tensor in ("weight", "bias"):
            nn.utils.parametrize.register_parametrization(layer, tensor, FixedPointQuantizer(bits=5, exponent=-3))
    set_quantizers(model, {"input_1": FixedPointQuantizer(bits=5, exponent=-3)})
    set_accumulators(model, {"0": 8})
    packed = packing.pack(model, _network(), shape)
    return {name: stream.tobytes() for name, stream in packed.streams.items()}, packed.structure.model_dump_json()


def packed(data: bytes) -> None:
    """Of an accepted file the counted bits are those of its streams, and it is packed again to the same values."""
    streams, structure = _packed()
    which, data = (data[0] % 6 if data else 0), data[1:]
    if which == 5:  # damage that the checksum sees
        found = packing.Packed(
            packing.Structure.model_validate_json(structure), {n: _bytes(s) for n, s in streams.items()}, {}
        )
        path = _file("weights.safetensors", edited(packing.file_bytes(found), data))
    else:
        names = ("values", "masks", "overhead")
        changed = {name: edited(streams[name], data) if which == i else streams[name] for i, name in enumerate(names)}
        text = edited(structure.encode(), data) if which > 2 else structure.encode()
        whole = {
            **{name: _bytes(stream) for name, stream in changed.items()},
            "structure": _bytes(zlib.compress(text, 1)),
        }
        path = _file("weights.safetensors", _save(whole))
    try:
        read = packing.read(path)
        model = packing.unpack(read, _network()).eval()
        recorded = trace(model, torch.zeros(1, 6))
        if without_values(recorded):
            return None
        again = packing.pack(model, _network(), torch.zeros(1, 6))
    except InputError as error:
        return _short(error)
    bits = [tensor.bits() for tensor in stored_tensors(recorded) if not tensor.in_code]
    for name, counted in (("values", sum(b.values for b in bits)), ("masks", sum(b.mask for b in bits)),
                          ("overhead", sum(b.overhead for b in bits))):  # fmt: skip
        if not 0 <= again.bits[name] - counted < 8:
            raise Wrong(f"{counted} bits of {name} are counted, {again.bits[name]} are written")
    other = packing.unpack(again, _network()).eval()
    if not torch.equal(model(torch.ones(2, 6)), other(torch.ones(2, 6))):
        raise Wrong("packed again, the model computes something else")
    return None


def _bytes(data: bytes) -> Any:
    return np.frombuffer(data, np.uint8)


def _save(streams: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    tensors = {name: torch.from_numpy(stream.copy()) for name, stream in streams.items()}
    return save(tensors, metadata=packing._metadata(streams, {}))


@cache
def _graph() -> bytes:
    return (
        graph_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))).model_dump_json().encode()
    )


def graph(data: bytes) -> None:
    """What a worker might give back; an accepted graph has no node beyond the lists."""
    try:
        model_of(Graph.model_validate(json.loads(edited(_graph(), data))))
    except (ValueError, RecursionError, ValidationError, StructureError):
        return


def _short(error: Exception) -> None:
    if len(str(error)) > 20_000:
        raise Wrong(f"a message of {len(str(error)):,} characters")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "limits": limits,
    "input": input_shape,
    "format": number_format,
    "graph": graph,
    "manifest": manifest,
    "recipe": recipe,
    "strategy": strategy,
    "packed": packed,
}


def warm(name: str) -> Callable[[bytes], None]:
    """A target that has run once: what it imports is no part of the time of an input."""
    TARGETS[name](b"")
    return TARGETS[name]


# --- engines ----------------------------------------------------------------------------------------------------------


class _Slow(BaseException):
    pass


def tried(target: Callable[[bytes], None], data: bytes) -> str:
    """What is wrong with the answer to one input; empty where nothing is."""

    def end(*_: object) -> None:
        raise _Slow

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        target(data)
    except (Exception, _Slow) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return ""


def random_bytes(name: str, count: int, seed: int = 0) -> dict[str, str]:
    """Findings of seeded random inputs: what is wrong -> the first input, as hexadecimal digits."""
    target, draw, found = warm(name), random.Random(seed), dict[str, str]()
    for _ in range(count):
        data = draw.randbytes(draw.choice((1, 5, 9, 13, 21, 41, 101)))
        if wrong := tried(target, data):
            found.setdefault(wrong.partition(":")[0], f"{wrong} <- {data.hex()}")
    return found


def with_hypothesis(name: str, count: int) -> dict[str, str]:
    """Findings of hypothesis, shrunk."""
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st

    target, found = warm(name), dict[str, str]()

    @seed(0)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=120))
    def check(data: bytes) -> None:
        wrong = tried(target, data)
        if wrong:
            found[wrong.partition(":")[0]] = f"{wrong} <- {data.hex()}"
        assert not wrong

    try:
        check()
    except Exception:  # of several findings hypothesis makes a group
        if not found:
            raise
    return found


def with_atheris(name: str, count: int) -> dict[str, str]:
    """Findings of atheris, in a process of its own, which it ends."""
    words = [sys.executable, "-c", INSTRUMENTED, name, f"-runs={count}", "-seed=1", "-max_len=120", "-len_control=0"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if "no interesting inputs" in ended.stderr:
        raise RuntimeError(f"{name}: atheris sees no code")
    if ended.returncode == 0:
        return {}
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if "Found:" in line]
    return {"atheris": "; ".join(lines[:3])[:500] or ended.stderr[-500:]}


INSTRUMENTED = """
import sys, atheris, torch, pydantic, torchvision
with atheris.instrument_imports(include=["micronet_eval", "tomllib"], enable_loader_override=False):
    from benchmarks import fuzz
fuzz.under_atheris(sys.argv[1], sys.argv[2:])
"""


def under_atheris(name: str, words: list[str]) -> None:
    """Runs a target in this process, whose code tells atheris where it is."""
    import atheris

    target = warm(name)

    def one(data: bytes) -> None:
        if wrong := tried(target, data):
            raise Wrong(f"Found: {wrong} <- {data.hex()}")

    atheris.Setup([sys.argv[0], *words], one)
    atheris.Fuzz()


ENGINES: dict[str, Callable[[str, int], dict[str, str]]] = {
    "random": random_bytes,
    "hypothesis": with_hypothesis,
    "atheris": with_atheris,
}


def main(names: list[str], count: int | None) -> None:
    """Runs targets under all engines that are there; without `count` each run is written in the place of its last."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    about = {"commit": commit.stdout.strip(), "python": platform.python_version(), "torch": torch.__version__}
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    order = {name: i for i, name in enumerate(TARGETS)}
    for engine, fuzz in ENGINES.items():
        for name in names if find_spec(engine) else ():
            inputs = count or OTHERS.get(engine) or RANDOM[name]
            warm(name)
            start, busy = time.perf_counter(), time.process_time()
            found = fuzz(name, inputs)
            seconds = [
                round(now - then, 1) for now, then in ((time.perf_counter(), start), (time.process_time(), busy))
            ]
            row = {"target": name, "engine": engine, **about, "inputs": inputs, "seconds": seconds[0],
                   "processor_seconds": seconds[1], "findings": list(found.values())}  # fmt: skip
            print(f"{name:10} {engine:10} {inputs:8,} inputs {seconds[0]:8.1f} s  {len(found)} findings", flush=True)
            for told in found.values():
                print(f"    {told}", flush=True)
            if count is None:
                others = [other for other in rows if (other["target"], other["engine"]) != (name, engine)]
                rows = sorted([*others, row], key=lambda r: (list(ENGINES).index(r["engine"]), order[r["target"]]))
                sums = {"inputs": sum(r["inputs"] for r in rows), "findings": sum(len(r["findings"]) for r in rows)}
                RESULTS.write_text(json.dumps({**sums, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if word in TARGETS]
    counts = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    main(chosen or list(TARGETS), counts[0] if counts else None)
