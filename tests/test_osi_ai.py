"""A verified entry of 2019 as witness: its layer table without its weights, its recounted scores with them.

The weights lie in the folder that MICRONET_LEADERBOARD names, or in ../shared/leaderboard; without them tests skip.
"""

import os
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from micronet_eval import evaluate
from micronet_eval.importing import import_weights, read_state_dict
from micronet_eval.merge import merged
from micronet_eval.plugins import lookup
from micronet_eval.storage import stored_tensors
from micronet_plugins.osi_ai import osi_ai

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "submissions" / "leaderboard" / "osi-ai"
PAGE = ROOT / "docs" / "leaderboard-osi-ai.md"
TASK = lookup("task", "cifar100")
measured = runpy.run_path(str(ROOT / "docs" / "osi_ai_measured.py"))

# The published layer table: block, parameters, multiplications, additions; dense and without batch norm.
TABLE = [
    ("stem", 648, 691_920, 622_728),
    ("blocks.0", 820, 669_132, 584_484),
    ("blocks.1", 5_379, 5_167_209, 4_590_315),
    ("blocks.2", 11_812, 5_455_164, 4_933_372),
    ("blocks.3", 25_448, 5_188_584, 4_908_848),
    ("blocks.4", 27_368, 5_620_584, 5_285_048),
    ("blocks.5", 40_329, 8_300_475, 7_896_393),
    ("blocks.6", 62_220, 12_452_004, 12_004_428),
    ("blocks.7", 68_364, 7_549_092, 7_228_348),
    ("blocks.8", 96_976, 4_156_368, 4_033_376),
    ("blocks.9", 104_456, 4_532_688, 4_385_392),
    ("head", 13_056, 659_736, 639_744),
    ("classifier", 13_700, 13_736, 20_128),
    ("exit", 20_660, 1_717_436, 1_596_564),
]
# What is wrong in it, worked out by hand: (parameters, multiplications, additions) to add to the row.
SLIPS = {
    "blocks.3": (0, 0, -15 * 15 * (240 - 40)),  # residual additions in as many channels as the expansion has
    "blocks.6": (0, 0, -15 * 15 * (384 - 64)),
    "blocks.8": (0, 0, -7 * 7 * (480 - 80)),
    "blocks.9": (200, 0, 0),  # 80 x 480 + 9 x 480 + 480 x 16 + 16 + 16 x 480 + 480 + 480 x 96 = 104,656
    "exit": (0, -100 * 135, 100 * 135),  # additions of the classifier in the column of multiplications
}


@pytest.fixture(scope="module")
def weights():
    folder = Path(os.environ.get("MICRONET_LEADERBOARD", ROOT.parent / "shared" / "leaderboard"))
    path = folder / "osi-ai" / "trained_model.pth"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="module")
def state(weights):
    return read_state_dict(weights)


@pytest.fixture(scope="module")
def blocks():
    account = measured["counted"](measured["dense"](early_exit=True, batch_norm=False))
    return {name: measured["block"](account, name) for name, *_ in TABLE}


# --- without the weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_a_block_of_the_layer_table(blocks, row):
    name, *published = row
    slips = SLIPS.get(name, (0, 0, 0))
    assert blocks[name] == tuple(theirs + slip for theirs, slip in zip(published, slips, strict=True))


def test_the_blocks_are_the_whole_network(blocks):
    assert (
        sum(parameters for parameters, _, _ in blocks.values()) == 491_436
    )  # as the state dict has without batch norm


def test_the_main_network_dense():
    math = measured["counted"](measured["dense"](early_exit=False, batch_norm=True)).math
    assert (math.mults, math.adds) == (60_456_692, 58_230_372)
    assert f"{math.ops32 / TASK.math:.6f}" == "0.008433"


def test_one_density_for_all_layers_gives_nearly_the_published_math():
    dense = measured["counted"](measured["dense"](early_exit=False, batch_norm=True))
    mults, adds = measured["assumed"](dense, lambda path: measured["DENSITY"])
    assert (round(mults), round(adds)) == (24_234_054, 22_007_734)
    assert f"{float(mults / 2 + adds) / TASK.math:.6f}" == "0.003253"


def test_with_the_slips_of_the_layer_table_it_gives_the_published_math():
    assert f"{measured['published_math'](None) / TASK.math:.6f}" == "0.003267"
    assert f"{measured['published_math'](measured['SHARES']) / TASK.math:.6f}" == "0.002803"


def test_stride_two_pads_at_the_bottom_and_the_right_only():
    model = osi_ai().eval()
    shapes = []
    for module in (model.stem, *model.blocks):
        module.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:])))
    model(torch.zeros(1, 3, 32, 32))
    sizes = [(24, 31), (16, 31), (24, 31), (40, 15), (40, 15), (48, 15), (64, 15), (64, 15), (80, 7), (80, 7), (96, 7)]
    assert shapes[-11:] == [(channels, size, size) for channels, size in sizes]


def test_the_confidence_decides_who_leaves():
    model = osi_ai(confidence=0.5).eval()
    with torch.no_grad():
        model.exit[2][2].weight.zero_()
        model.exit[2][2].bias.copy_(torch.eye(100)[7] * 4.5)  # e^4.5 = 90 against 99 others: 0.476
        model(torch.zeros(2, 3, 32, 32))
        assert model.taken == ["full", "full"]
        model.exit[2][2].bias.copy_(torch.eye(100)[7] * 4.7)  # 110 against 99: 0.526
        assert model(torch.zeros(2, 3, 32, 32)).argmax(1).tolist() == [7, 7]
        assert model.taken == ["exit", "exit"]


def test_the_tables_of_the_page_that_need_no_weights():
    text = PAGE.read_text()
    assert measured["filled"](text, {"blocks": measured["table_of_blocks"]()}) == text


# --- with the weights -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def main_network(state):
    return measured["sparse"](False, state)


def test_the_main_network(main_network):
    account = measured["counted"](main_network)
    assert (account.math.mults, account.math.adds) == (27_160_517, 24_934_197)
    storage, math = account.storage.params32 / TASK.storage, account.math.ops32 / TASK.math
    assert (f"{storage:.6f}", f"{math:.6f}", f"{storage + math:.6f}") == ("0.002833", "0.003672", "0.006505")


def test_storage_with_a_mask_for_every_weight_and_with_the_smaller_of_both(main_network):
    assert measured["counted"](main_network).storage.params32 == 103_405
    stored = list(stored_tensors(main_network))
    masked = sum(16 * s.nonzeros + s.elements if s.tensor.dim() > 1 else 16 * s.elements for s in stored)
    assert masked / 32 == 103_408
    (dense,) = [s for s in stored if s.tensor.dim() > 1 and s.mask(16, s.format) is None]
    assert (dense.name, dense.elements, dense.nonzeros) == ("blocks.2.depthwise.conv.weight", 1_296, 1_221)


def test_the_state_dict_without_batch_norm(state):
    model = osi_ai()
    model.load_state_dict(dict(state))
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    tensors = [p for p in model.parameters() if id(p) not in norms]
    assert sum(p.numel() for p in tensors) == 491_436
    assert sum(int(p.count_nonzero()) for p in tensors) == 181_749


def test_the_submission_as_the_documentation_makes_it(weights, tmp_path):
    import_weights(FOLDER, weights, tmp_path / "osi-ai")
    report = evaluate(tmp_path / "osi-ai", data="no-such-folder")
    assert f"{report.score.storage:.6f}" == "0.002995"
    assert f"{report.score.math:.6f}" == "0.003271"
    assert f"{report.score.total:.6f}" == "0.006267"
    assert [(path.name, path.share, path.measured) for path in report.paths] == [
        ("exit", 0.2929, False),
        ("full", 0.7071, False),
    ]
    assert {claim.name: claim.holds for claim in report.claims} == {"storage": True, "math": False, "score": False}
    assert not report.passed
    assert report.freebie


def test_every_example_pays_for_the_exit_and_the_confidence(state, main_network):
    paths = measured["counted"](measured["sparse"](True, state), measured["SHARES"]).paths
    main = measured["counted"](main_network).math
    depthwise, pointwise, classifier = 375 * 225, 3_927 * 225, 5_978
    swish, pool, softmax = 3 * (48 + 136) * 225, 136, 200
    assert paths["full"].mults - main.mults == depthwise + pointwise + classifier + swish + pool + softmax
    swish, pool, confidence = (48 + 136) * 225, 136 * 224, 99 + 99 + 1  # softmax, largest of 100, comparison
    assert paths["full"].adds - main.adds == depthwise + pointwise + classifier + swish + pool + confidence


def test_the_merged_network_computes_the_same(state):
    model = osi_ai().eval()
    model.load_state_dict(dict(state))
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    again = merged(model, x[:1])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in again.modules())
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), atol=1e-4, rtol=1e-4)
    assert again.taken == model.taken


def test_the_tables_of_the_page(state):
    text = PAGE.read_text()
    tables = {"scores": measured["table_of_scores"](state), "counts": measured["table_of_counts"](state)}
    assert measured["filled"](text, tables) == text
    for number in ("41.17 %", "36.00 %"):
        assert number in text
    dense, sparse = (measured["counted"](t) for t in (measured["dense"](False, True), measured["sparse"](False, state)))
    assert f"{sparse.math.macs / dense.math.macs:.2%}" == "41.17%"
    convolutions = [v for k, v in state.items() if k.endswith("weight") and v.dim() > 1 and not k.startswith("_exit")]
    assert f"{sum(int(v.count_nonzero()) for v in convolutions) / sum(v.numel() for v in convolutions):.2%}" == "36.00%"
