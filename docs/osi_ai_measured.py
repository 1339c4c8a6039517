"""Fills the tables of docs/leaderboard-osi-ai.md: python docs/osi_ai_measured.py STATE_DICT."""

import re
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from micronet_eval import plugins
from micronet_eval.importing import read_state_dict
from micronet_eval.merge import merged
from micronet_eval.paths import mean_account
from micronet_eval.scoring import Account
from micronet_eval.structure import replace, without_weights
from micronet_eval.trace import Trace, trace
from micronet_plugins.osi_ai import osi_ai

PAGE = Path(__file__).parent / "leaderboard-osi-ai.md"
EXAMPLE = torch.zeros(1, 3, 32, 32)
SHARES = {"exit": Fraction("0.2929"), "full": Fraction("0.7071")}
DENSITY, EXIT_DENSITY = Fraction("0.36"), Fraction("0.5")
DOT_PRODUCTS = ("aten.convolution", "aten.addmm")

# The published layer table: what, where it is in our network, parameters, multiplications, additions.
BLOCKS = (
    ("stem", "stem", 648, 691_920, 622_728),
    ("MBConv 0", "blocks.0", 820, 669_132, 584_484),
    ("MBConv 1", "blocks.1", 5_379, 5_167_209, 4_590_315),
    ("MBConv 2", "blocks.2", 11_812, 5_455_164, 4_933_372),
    ("MBConv 3", "blocks.3", 25_448, 5_188_584, 4_908_848),
    ("MBConv 4", "blocks.4", 27_368, 5_620_584, 5_285_048),
    ("MBConv 5", "blocks.5", 40_329, 8_300_475, 7_896_393),
    ("MBConv 6", "blocks.6", 62_220, 12_452_004, 12_004_428),
    ("MBConv 7", "blocks.7", 68_364, 7_549_092, 7_228_348),
    ("MBConv 8", "blocks.8", 96_976, 4_156_368, 4_033_376),
    ("MBConv 9", "blocks.9", 104_456, 4_532_688, 4_385_392),
    ("head", "head", 13_056, 659_736, 639_744),
    ("pool, classifier", "classifier", 13_700, 13_736, 20_128),
    ("early exit", "exit", 20_660, 1_717_436, 1_596_564),
)
# (height x width) x (expanded - real channels) of the residual additions
TOO_WIDE = {"blocks.3": 15 * 15 * (240 - 40), "blocks.6": 15 * 15 * (384 - 64), "blocks.8": 7 * 7 * (480 - 80)}

SWAPPED = 100 * (136 - 1)  # additions in the exit's classifier


def dense(early_exit: bool, batch_norm: bool) -> Trace:
    """The network without weights, so that all count; batch norm as a bias, or left out as in the published table."""
    with without_weights():
        model = osi_ai(early_exit).eval()
    if not batch_norm:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                replace(model, path, nn.Identity())
    return trace(merged(model, EXAMPLE), EXAMPLE)


def sparse(early_exit: bool, state: Mapping[str, Tensor]) -> Trace:
    """The network with the team's weights, batch norm merged."""
    model = osi_ai(early_exit).eval()
    model.load_state_dict(dict(state))
    return trace(merged(model, EXAMPLE), EXAMPLE)


def counted(recorded: Trace, shares: Mapping[str, Fraction] | None = None) -> Account:
    """What a trace costs; without shares all examples of a conditional network take the longest path."""
    return mean_account(recorded, plugins.formulas(), shares)


def block(account: Account, path: str) -> tuple[int, int, int]:
    """Parameters, multiplications and additions of one block, in a dense network that counts as 16 bit."""
    layers = [layer for layer in account.layers if f"{layer.module}.".startswith(f"{path}.")]
    return (
        sum(layer.storage_bits for layer in layers) // 16,
        sum(int(layer.mults) for layer in layers),
        sum(int(layer.adds) for layer in layers),
    )


def assumed(account: Account, density: Callable[[str], Fraction]) -> tuple[Fraction, Fraction]:
    """Multiplications and additions of a dense network, were each layer as dense as `density` says of its path."""
    mults = adds = Fraction(0)
    for layer in account.layers:
        left_out = (1 - density(layer.module)) * Fraction(layer.mults) if layer.op in DOT_PRODUCTS else 0
        mults, adds = mults + Fraction(layer.mults) - left_out, adds + Fraction(layer.adds) - left_out
    return mults, adds


def published_math(shares: Mapping[str, Fraction] | None) -> float:
    """Our supposition of how the published math term came about, in 32-bit operations.

    Every convolution of the main network 36 % dense and every layer of the exit 50 %, the main classifier dense,
    residual additions as wide as the expansion, additions of the exit's classifier counted as multiplications, and no
    operations for the confidence.
    """

    def density(path: str) -> Fraction:
        return Fraction(1) if path.startswith("classifier") else EXIT_DENSITY if path[:4] == "exit" else DENSITY

    main = shares is None
    account = counted(dense(early_exit=not main, batch_norm=True), shares)
    confidence = [layer for layer in account.layers if layer.module == ""]
    mults, adds = assumed(account, density)
    mults, adds = mults - sum(Fraction(x.mults) for x in confidence), adds - sum(Fraction(x.adds) for x in confidence)
    rest, swapped = (Fraction(1), Fraction(0)) if shares is None else (shares["full"], EXIT_DENSITY * SWAPPED)
    wide = TOO_WIDE["blocks.3"] + rest * (TOO_WIDE["blocks.6"] + TOO_WIDE["blocks.8"])
    return float((mults + swapped) / 2 + adds - swapped + wide)


def table_of_blocks() -> str:
    """Every row of the published table beside ours."""
    account = counted(dense(early_exit=True, batch_norm=False))
    rows = [
        "| block | parameters | ours | mults, dense | ours | adds, dense | ours |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, path, *published in BLOCKS:
        cells = [f"{x:,} | {_beside(x, ours)}" for x, ours in zip(published, block(account, path), strict=True)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _beside(published: int, ours: int) -> str:
    return "=" if published == ours else f"{ours:,} ({ours - published:+,})"


def table_of_scores(state: Mapping[str, Tensor]) -> str:
    """The published scores beside ours."""
    task = plugins.lookup("task", "cifar100")
    main, early = counted(sparse(False, state)), counted(sparse(True, state), SHARES)
    rows = ["| figure | published | ours | by our supposition |", "|---|---:|---:|---:|"]
    for name, published, account, supposed in (
        ("main network", ("0.002833", "0.003267", "0.006100"), main, published_math(None)),
        ("with the early exit", ("0.002995", "0.002803", "0.005798"), early, published_math(SHARES)),
    ):
        storage = account.storage.params32 / task.storage
        for term, theirs, ours, guess in zip(
            ("storage", "math", "score"),
            published,
            (storage, account.math.ops32 / task.math, storage + account.math.ops32 / task.math),
            (None, supposed / task.math, storage + supposed / task.math),
            strict=True,
        ):
            rows.append(f"| {name}: {term} | {theirs} | {ours:.6f} | {'' if guess is None else f'{guess:.6f}'} |")
    return "\n".join(rows)


def table_of_counts(state: Mapping[str, Tensor]) -> str:
    """Operations of the main network under three assumptions about its zeros, and of both paths."""
    task = plugins.lookup("task", "cifar100")
    all_dense = counted(dense(early_exit=False, batch_norm=True))
    even_mults, even_adds = assumed(all_dense, lambda path: DENSITY)
    paths = counted(sparse(True, state), SHARES)
    rows = ["| | mults | adds | of the baseline's math |", "|---|---:|---:|---:|"]
    for name, mults, adds in (
        ("main network, dense", all_dense.math.mults, all_dense.math.adds),
        ("main network, one density of 0.36 in every layer", round(even_mults), round(even_adds)),
        ("main network, the real zeros", *_operations(counted(sparse(False, state)))),
        ("an example that leaves by the exit", paths.paths["exit"].mults, paths.paths["exit"].adds),
        ("an example that does not", paths.paths["full"].mults, paths.paths["full"].adds),
        ("mean, 29.29 % leave", *_operations(paths)),
    ):
        rows.append(f"| {name} | {mults:,.0f} | {adds:,.0f} | {(float(mults) / 2 + float(adds)) / task.math:.6f} |")
    return "\n".join(rows)


def _operations(account: Account) -> tuple[float, float]:
    return account.math.mults, account.math.adds


def filled(text: str, tables: Mapping[str, str]) -> str:
    """The page with each table between its two comments."""
    for name, table in tables.items():
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, block=block: block, text, flags=re.S)
    return text


def main() -> None:
    """Rewrites the page."""
    state = read_state_dict(Path(sys.argv[1]))
    tables = {"blocks": table_of_blocks(), "scores": table_of_scores(state), "counts": table_of_counts(state)}
    PAGE.write_text(filled(PAGE.read_text(), tables))


if __name__ == "__main__":
    main()
