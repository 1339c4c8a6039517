"""The page of the documentation on speed, from the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.counting import FORWARD, META, MODELS, OURS, RACES

TITLES = {
    "count": "A full score of a model",
    "process": "The command as a whole process",
    "linear": "Time against the number of operations",
    "llama": "70 billion parameters, context 4,096, on the meta device",
    "packing": "100 MB of 9-bit weights, 45 % zeros: pack and unpack",
    "nonzeros": "Non-zero count and storage of 1 GB of float32",
    "quality": "Quality of fake-quantized networks on test sets",
    "compare": "64 jobs of `compare` on 2 processes",
    "eigendamage": "A round of eigendamage",
}

WHERE_THE_TIME_GOES = {
    "count": """
A score traces the model once, finds which values are zero, and prices each operation. The trace works out the shapes of
the commonest operations itself (`micronet_eval.shapes`): torch's kernels on the meta device are Python for batch norm
(0.6 ms each), layer norm, softmax and element-wise operations, and are what a meta forward spends its time on. Batch
norm is merged in the trace. A kernel of torch is asked once for each layout of its tensors. And the commonest layers go
the long way, through the calls of modules, torch's modes and its dispatcher, only once for each kind, where nothing
else comes between a layer and its operation (`micronet_eval.shortcuts`). Nothing is set on a class of torch meanwhile,
which would make Python forget what it knows of all modules, and tensors are asked for their shapes outside of torch's
modes, which would make each question a call of Python. What is left, by the profile: reading all weights once, at
0.4 ms a million, 0.6 where a batch norm scales them; and Python, less than 0.1 ms an operation, two fifths of it the
trace. The counters by hooks on modules run a real forward, and look at no weight. What they run also depends on what
else is in the process: behind other large models, glibc keeps the memory that a forward asks for, and all caches are
cold. Measured apart, on 2026-11-30: with all counters in one process ours takes 1.05 of ultralytics-thop on
EfficientNet-B0.
""",
    "process": """
Submission 3 is unpacked into 1,756 tensors and a graph of 1,937 modules, which runs once. By the profile: more than a
third of the evaluation unpacks, most of that torch's registration of 1,059 quantizers as parametrizations, the building
of 874 convolutions and the code that torch.fx writes; a fifth is the trace, a fifth the account, a third of that the
search for 1,059 masks, 5 % the widths of accumulators for 48,403 channels. The command hardly searches for garbage,
where `import torch` does for a quarter of its time, and at its end it takes nothing apart (0.2 s).
""",
    "linear": """
Nothing is looked for among all operations. But of each there are 4 KB and 21 objects, which are read again at each step
of the account, and once in a search for garbage: of 1,000 operations they lie in the caches, of 30,000 in memory. All
steps take 1.2 to 1.5 times as long there but the run of the model itself.
""",
    "llama": """
The parameters lie on the meta device: they have shapes, no values, and take no memory. What is resident is Python,
torch and transformers, and one causal mask: constants that each layer makes alike are held once.
""",
    "packing": """
Bits are a small part. Packing quantizes twice, once in the trace and once to check that the model computes with what is
stored, at three passes over 25 million values each; it finds the smallest of 14 masks, most of which a part of the
tensor rules out, checks that each value is on its grid, and writes codes of 16 bits a piece at a time.
""",
    "quality": """
Digits are few and their network is small: rounding each activation, which reads and writes it three times, and each
weight once, is a large part beside its convolutions. Weights are quantized once for all batches
(`torch.nn.utils.parametrize.cached`): the very tensors that the trace counted. For digits the ratio is the median of
5 processes, in which glibc keeps the memory that tensors leave behind. Else it does so or not by where the last of them
happens to lie, and the ratio is between 1.1 and 1.5, whether or not something else runs. Measured three times on
2026-11-30, it was 1.30, 1.37 and 1.25.
""",
    "compare": """
Two processes start, and each imports torch before its first job; no job's own time has that in it. Beside jobs that
train, it is little; beside 64 evaluations of a sixth of a second each it is most of what is lost, and the limit as
long as jobs are run by processes of their own, which keep a job that dies from taking the others with it.
""",
    "eigendamage": """
A round goes forward and backward twice: once for the Kronecker factors, once for the corrected eigenvalues. The latter
take the gradient of each example in the eigenbasis, one after the other, so that it is squared while it is cached, and
a batch of gradients is never held: less memory than a plain backward takes. The rest is the eigenvectors of the
factors, in double precision: with small images, 64 x 64, the largest part of a round on ResNet-50 (29 %).
""",
}
"""What the profile says of each row."""


def page(results: Mapping[str, Any]) -> str:
    """The whole page."""
    lines = [
        "# How fast it is",
        "",
        "`OMP_NUM_THREADS=1 python -m benchmarks` writes this page, and all numbers to",
        "[speed.json](../benchmarks/results/speed.json). Seconds are those of the processor, in one thread, so that",
        "what else the machine does matters little; medians of 5 rounds, each of which runs all that are compared, one",
        "after the other, in another order each time. A ratio is the median of the ratios of the rounds. Counters are",
        f"raced with ours one by one, each in a process of its own, {RACES} rounds.",
        "",
        *_targets(results),
        *_seven_counters(results.get("count")),
    ]
    for row, title in TITLES.items():
        if row in results:
            lines += _section(title, results[row], WHERE_THE_TIME_GOES.get(row, ""), row)
    return "\n".join(lines).rstrip() + "\n"


def _targets(results: Mapping[str, Any]) -> list[str]:
    lines = ["## Targets", "", "| what, against what | measured | target | |", "|---|---:|---:|---|"]
    for row, title in TITLES.items():
        if row not in results:
            lines.append(f"| {title} | not measured | | |")
            continue
        for what, measured, target, bound in results[row]["targets"]:
            met = measured <= target if bound == "at most" else measured >= target
            lines.append(f"| {what} | {measured:.3g} | {bound} {target:g} | {'met' if met else '**missed**'} |")
    return [*lines, ""]


def _seven_counters(row: Mapping[str, Any] | None) -> list[str]:
    """The MACs that each counter returns, in millions."""
    if row is None:
        return []
    models = row["models"]
    counters = list(dict.fromkeys(c for m in models.values() for c in (*m["seconds"], *m["failed"], *m["missing"])))
    head = "| | " + " | ".join(MODELS) + " |"
    lines = ["## Seven counters, five answers", "", "Millions of MACs, and milliseconds of the processor.", "", head]
    lines.append("|---|" + "---:|" * len(MODELS))
    for counter in counters:
        cells = [_cell(models[name], counter) for name in MODELS]
        lines.append(f"| {'**' + counter + '**' if counter == OURS else counter} | {' | '.join(cells)} |")
    answers = {
        name: len({round(n / 1e6) for c, n in models[name]["macs"].items() if n and c not in (FORWARD, META)})
        for name in MODELS
    }
    told = ", ".join(f"{n} for {name}" for name, n in answers.items())
    return [
        *lines,
        "",
        f"Different answers, to the million: {told}.",
        "Ours are multiplications of dot products by weights that are not zero, of the network that runs when batch",
        "norm is merged.",
        "",
    ]


def _cell(model: Mapping[str, Any], counter: str) -> str:
    if counter in model["missing"]:
        return "missing"
    if counter in model["failed"]:
        return "fails"
    if counter not in model["seconds"]:
        return ""
    macs, seconds = model["macs"].get(counter), model["seconds"][counter]
    return f"{1000 * seconds:.0f} ms" if macs is None else f"{macs / 1e6:,.0f}; {1000 * seconds:.0f} ms"


def _section(title: str, row: Mapping[str, Any], why: str, name: str) -> list[str]:
    e = row["environment"]
    lines = [f"## {title}", ""]
    if name != "count":
        lines += [f"- {what}: {value}" for what, value in _flat(row) if value is not None]
        lines.append("")
    if why:
        lines += [*why.strip().splitlines(), ""]
    threads = "1 thread" if e["threads"] == "1" else f"{e['threads']} threads"
    lines += [f"{e['date']}, {e['commit']}: {e['processor']}, {threads}, Python {e['python']}, torch {e['torch']}.", ""]
    return lines


def _flat(row: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Names and numbers of a row, those of dicts in it under their names."""
    found: list[tuple[str, str]] = []
    for key, value in row.items():
        if key in ("environment", "targets"):
            continue
        where = f"{above}, {key}" if above and above != "seconds" else str(key)
        if isinstance(value, Mapping):
            found += _flat(value, str(key) if above in ("", "seconds") else where)
        elif isinstance(value, float) and (above == "seconds" or key in ("seconds", "wall")):
            found.append((where, f"{value:.3g} s"))
        else:
            found.append((where, f"{value:,}" if isinstance(value, int) else f"{value:.3g}"))
    return found
