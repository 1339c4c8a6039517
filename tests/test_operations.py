"""Every kind of operation against numbers worked out by hand or given by another counter; the same in every mode."""

import math
from contextlib import nullcontext
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model

import micronet_eval
from micronet_eval.costs import FORMULAS, NoFormula, permutation_of
from micronet_eval.errors import InputError
from micronet_eval.formats import FixedPointQuantizer
from micronet_eval.scoring import account
from micronet_eval.structure import without_weights
from micronet_eval.trace import trace


class Call(nn.Module):
    """A module whose forward is `function(self, ...)`, with these members."""

    def __init__(self, function, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.forward = MethodType(function, self)


def ones(*shape):
    return nn.Parameter(torch.ones(shape))


def dense(model):
    """No parameter is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def math_of(model, *inputs):
    return account(trace(model, inputs), FORMULAS, freebie=False).math


def count(function, *shapes, **members):
    """Multiplications and additions of a module, or of a function of tensors, on inputs of these shapes."""
    model = function if isinstance(function, nn.Module) else Call(lambda self, *x: function(*x), **members)
    counted = math_of(model, *(torch.ones(shape) for shape in shapes))
    return counted.mults, counted.adds


# --- what other counters get wrong ------------------------------------------------------------------------------------


class QueryKeyValue(nn.Module):
    """One linear layer for query, key and value, and attention of four heads."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.layer(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, need_weights=True):
        super().__init__()
        self.layer = nn.MultiheadAttention(64, 4, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        return self.layer(x, x, x, need_weights=self.need_weights)


def half_zero():
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.fill_(1).view(-1)[::2] = 0
    return layer


def functional(function, *weight):
    return lambda: Call(function, w=ones(*weight))


def encoder(layers):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, layers) if layers > 1 else layer


GOLDEN = {
    "conv2d": (functional(lambda self, x: F.conv2d(x, self.w, padding=1), 8, 8, 3, 3), (1, 8, 16, 16), 147_456),
    "matrix": (functional(lambda self, x: x @ self.w, 64, 64), (1, 64), 4_096),
    "einsum": (functional(lambda self, x: torch.einsum("bi,io->bo", x, self.w), 64, 64), (1, 64), 4_096),
    "lstm": (lambda: nn.LSTM(64, 64), (16, 1, 64), 524_288),
    "attention": (SelfAttention, (1, 16, 64), 294_912),
    "attention without weights": (lambda: SelfAttention(need_weights=False), (1, 16, 64), 294_912),
    "transformer": (lambda: encoder(1), (1, 16, 64), 557_056),
    "two of them": (lambda: encoder(2), (1, 16, 64), 1_114_112),
    "query-key-value": (QueryKeyValue, (1, 16, 64), 229_376),
    # 3 gates of 64 x (64 + 64), 16 steps; one gate of the same
    "gru": (lambda: nn.GRU(64, 64), (16, 1, 64), 393_216),
    "rnn": (lambda: nn.RNN(64, 64), (16, 1, 64), 131_072),
}

MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.rule("math.one-mode")
def test_macs_in_every_mode(name, training, mode):
    build, shape, macs = GOLDEN[name]
    for device, dtype in (("cpu", torch.float32), ("meta", torch.float32), ("cpu", torch.bfloat16)):
        model = dense(build()).to(device, dtype).train(training)
        with MODES[mode]():
            assert math_of(model, torch.zeros(shape, device=device, dtype=dtype)).macs == macs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_of_the_weights_are_zero(mode, dtype):
    with MODES[mode]():
        assert math_of(half_zero().to(dtype), torch.zeros(1, 64, dtype=dtype)).macs == 2_048


@pytest.mark.parametrize("mode", MODES)
def test_vit_b_16(mode):
    with without_weights():
        model = get_model("vit_b_16").bfloat16()
    with MODES[mode]():
        assert math_of(model, torch.zeros(1, 3, 224, 224, dtype=torch.bfloat16)).macs == 17_563_828_224


# --- dot products -----------------------------------------------------------------------------------------------------


def flops(model, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (1, 4, 8)),
        (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (2, 4, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (1, 4, 5, 5)),
        (nn.ConvTranspose3d(2, 3, 2, dilation=2), (1, 2, 4, 4, 4)),
        (nn.Conv2d(4, 6, 4, padding="same", dilation=2, groups=2), (1, 4, 8, 8)),
        (nn.Conv3d(4, 6, (1, 3, 5), stride=(1, 2, 3)), (2, 4, 8, 8, 8)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (1, 4, 8, 8)),
    ],
    ids=str,
)
def test_convolutions_agree_with_torchs_flop_counter(layer, shape):
    x = torch.ones(shape)
    assert 2 * math_of(dense(layer), x).macs == flops(layer, x)


@pytest.mark.rule("math.transposed")
def test_transposed_convolution_by_hand():
    # 3 inputs x 3 taps, stride 2: the full result has 7 elements, reached by 1 1 2 1 2 1 1 products, 2 of them twice.
    layer = dense(nn.ConvTranspose1d(1, 1, 3, stride=2))
    assert count(layer, (1, 1, 3)) == (9, 2 + 7)  # and 7 biases
    # Padding cuts one off at each end: the same products, 5 biases.
    assert count(dense(nn.ConvTranspose1d(1, 1, 3, stride=2, padding=1)), (1, 1, 3)) == (9, 2 + 5)


def test_transposed_convolution_with_gaps():
    # Stride 3 with a single tap: every third element is reached; the gaps cost nothing, not even a bias.
    assert count(dense(nn.ConvTranspose1d(1, 1, 1, stride=3)), (1, 1, 3)) == (3, 3)


def test_sparse_transposed_convolution():
    layer = nn.ConvTranspose1d(2, 2, 2, bias=False)
    layer.weight.data = torch.tensor([[[1.0, 1], [0, 0]], [[1, 0], [0, 1]]])
    # First output: of channel 0 two taps, of channel 1 one; second output: one tap of channel 1. 3 positions.
    # 4 elements of the first are reached by 2, 3, 3, 1 products: 5 additions; 3 of the second by 1.
    assert count(layer, (1, 2, 3)) == (3 * 4, 5)


def test_transposed_convolution_with_groups_keeps_their_weights_apart():
    layer = dense(nn.ConvTranspose1d(2, 2, 1, groups=2, bias=False))
    assert count(layer, (1, 2, 3)) == (6, 0)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda a, b: torch.einsum("bij,bjk->bik", a, b), [(2, 3, 4), (2, 4, 5)], (120, 90)),
        (lambda a, b: torch.einsum("i,i->", a, b), [(5,), (5,)], (5, 4)),
        (torch.dot, [(5,), (5,)], (5, 4)),
        (torch.mv, [(3, 5), (5,)], (15, 12)),
        (lambda m, x: torch.addmv(m[:, 0], m, x), [(3, 5), (5,)], (15, 15)),
        (torch.outer, [(3,), (5,)], (15, 0)),
        (lambda m, x: torch.addmv(m[:, 0], m, x, beta=0), [(3, 5), (5,)], (15, 12)),
        (lambda m, x: torch.addr(m, m[:, 0], x), [(3, 5), (5,)], (15, 15)),
        (lambda a, b: torch.addbmm(a[0, :, :1], a, b, beta=0), [(2, 3, 4), (2, 4, 5)], (15 * 8, 15 * 7)),
        (lambda a, b: torch.baddbmm(a[:, :, :1], a, b), [(2, 3, 4), (2, 4, 5)], (120, 120)),
        (lambda a, b: torch.baddbmm(a[:, :, :1], a, b, alpha=2), [(2, 3, 4), (2, 4, 5)], (120 + 30, 120)),
        (lambda a, b: torch.baddbmm(a[:, :, :1], a, b, beta=0), [(2, 3, 4), (2, 4, 5)], (120, 90)),
        (lambda a, b: torch.addbmm(a[0, :, :1], a, b), [(2, 3, 4), (2, 4, 5)], (15 * 8, 15 * 8)),  # terms: 2 x 4
        (lambda a, b: torch.tensordot(a, b, 2), [(3, 4, 5), (4, 5, 6)], (18 * 20, 18 * 19)),
        (torch.cdist, [(3, 4), (5, 4)], (15 * 5, 15 * 7)),  # 4 squares and a root; 4 differences and 3 sums
    ],
)
def test_products(function, shapes, expected):
    assert count(function, *shapes) == expected


@pytest.mark.parametrize(
    ("factors", "mults", "biased"),
    [({}, 0, 1), ({"beta": -1, "alpha": -1}, 0, 1), ({"beta": 2}, 10, 1), ({"alpha": 0}, 10, 1), ({"beta": 0}, 0, 0)],
)
def test_factors_of_a_product_multiply_each_output(factors, mults, biased):
    # 2 x 5 outputs of 4 terms; a factor that changes more than the sign is a multiplication.
    shapes = [(2, 5), (2, 4), (4, 5)]
    assert count(lambda c, a, b: torch.addmm(c, a, b, **factors), *shapes) == (40 + mults, 30 + 10 * biased)


def test_zero_weights_of_a_product_of_constants_that_is_added_to_an_activation():
    sparse = nn.Parameter(torch.tensor([[1.0, 0], [0, 0], [1, 0], [0, 0]]))
    # 3 x 2 outputs: the first column of 2 terms and the addend, the second of none.
    assert count(Call(lambda self, x: torch.addmm(x, self.a, self.b), a=ones(3, 4), b=sparse), (3, 2)) == (6, 6)


def test_batched_products_with_a_dense_constant_on_either_side():
    # 2 x 3 x 4 outputs of 5 terms.
    assert count(Call(lambda self, x: x @ self.m, m=ones(2, 5, 4)), (2, 3, 5)) == (120, 96)
    assert count(Call(lambda self, x: self.m @ x, m=ones(2, 3, 5)), (2, 5, 4)) == (120, 96)


def test_rows_that_are_dealt_to_matrices():
    ends, narrow = torch.tensor([3, 6], dtype=torch.int32), nn.Parameter(torch.ones(2, 16, 8, dtype=torch.bfloat16))
    dealt = Call(lambda self, x: torch._grouped_mm(x.bfloat16(), self.m, offs=ends), m=narrow)
    assert count(dealt, (6, 16)) == (6 * 8 * 16, 6 * 8 * 15)
    with torch.no_grad():
        narrow[0, :8] = 0  # half of the weights of one of the matrices
        narrow[1, :, :4] = 0  # and half of the outputs of the other
    assert count(dealt, (6, 16)) == (6 * 64, 6 * 64 - 6 * 12 // 2)
    both = Call(lambda self, x: torch._grouped_mm(x.bfloat16(), self.m), m=nn.Parameter(narrow.data.clone().fill_(1)))
    assert count(both, (2, 3, 16)) == (2 * 3 * 8 * 16, 2 * 3 * 8 * 15)


def test_bilinear_layer():
    # 2 examples x 5 outputs of 3 x 4 weights: two products a weight, 11 sums and the bias.
    assert count(dense(nn.Bilinear(3, 4, 5)), (2, 3), (2, 4)) == (10 * 24, 10 * 12)


def test_vector_times_a_sparse_constant():
    model = Call(lambda self, x: torch.mv(self.w, x), w=nn.Parameter(torch.tensor([[1.0, 0, 1], [0, 0, 0]])))
    assert count(model, (3,)) == (2, 1)


@pytest.mark.parametrize(
    ("function", "constant", "shape", "expected"),
    [
        (torch.mv, [1.0, 0, 0, 2, 0], (3, 5), (6, 3)),  # 3 outputs of 2 terms
        (torch.mv, [0.0, 0, 0, 0, 0], (3, 5), (0, 0)),
        (torch.dot, [1.0, 0, 0, 2, 3], (5,), (3, 2)),
        (lambda x, c: torch.dot(c, x), [1.0, 0, 0, 2, 3], (5,), (3, 2)),
        (lambda x, c: c @ x, [[[1.0, 0], [1, 1]], [[0, 0], [0, 1]]], (2, 2, 3), (12, 3)),  # rows of 1, 2, 0, 1 terms
        (lambda x, c: F.conv_transpose1d(x, c, groups=2), [[[1.0]], [[0]], [[1]], [[1]]], (2, 4, 3), (18, 6)),
        (lambda x, c: F.bilinear(x, x, c), [[[1.0, 1], [1, 0]], [[0, 0], [0, 0]]], (5, 2), (5 * 6, 5 * 2)),
    ],
)
def test_products_with_a_constant_that_has_zeros(function, constant, shape, expected):
    assert count(Call(lambda self, x: function(x, self.c), c=nn.Parameter(torch.tensor(constant))), shape) == expected


def test_bag_of_embeddings_with_a_weight_for_each():
    bags = torch.zeros(2, 3, dtype=torch.int64)
    layer = nn.EmbeddingBag(10, 4, mode="sum")
    counted = math_of(Call(lambda self, x, w: layer(x, per_sample_weights=w)), bags, torch.ones(2, 3))
    # 2 bags of 3 rows of 4: dot products of 3 terms.
    assert (counted.mults, counted.adds, counted.macs) == (24, 16, 24)


def test_bag_of_embeddings():
    bags = torch.zeros(2, 3, dtype=torch.int64)
    totals = {mode: math_of(nn.EmbeddingBag(10, 4, mode=mode), bags) for mode in ("sum", "mean", "max")}
    # 2 bags of 3 rows of 4.
    assert {mode: (m.mults, m.adds) for mode, m in totals.items()} == {"sum": (0, 16), "mean": (8, 16), "max": (0, 16)}
    table, ends = nn.Parameter(torch.ones(10, 4)), torch.tensor([0, 3])
    unsaid = Call(lambda self, x: torch.ops.aten._embedding_bag(self.t, x, ends)[0], t=table)  # sums, by its schema
    assert math_of(unsaid, bags.flatten()) == totals["sum"]


def test_a_bag_accumulates_its_sum_and_compares_for_its_maximum():
    def cost(mode):
        layer = nn.EmbeddingBag(10, 4, mode=mode)
        (priced,) = account(trace(layer, torch.zeros(2, 3, dtype=torch.int64)), FORMULAS).operations
        return priced.cost.adds, priced.cost.accumulations

    assert (cost("sum"), cost("max")) == ((0, 16), (16, 0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.rule("math.attention")
def test_fused_attention_costs_what_it_is_made_of(causal):
    """Formulas of operations that only an exported program contains, against the trace that takes them apart."""
    shapes = [(1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 4)]
    fused = count(lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0], *shapes)
    assert fused == count(F.scaled_dot_product_attention, *shapes)
    # 10 scores of 4 terms for each of 7 keys, as many again for the values; scaling 2 x (5 + 7) x 4; softmax.
    assert fused[0] == 2 * 280 + 96 + 2 * 70


def test_fused_attention_adds_its_mask_to_each_score():
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    shapes = [(1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 4), (5, 7)]
    plain = count(lambda q, k, v, m: kernel(q, k, v)[0], *shapes)
    masked = count(lambda q, k, v, m: kernel(q, k, v, attn_mask=m)[0], *shapes)
    # Scores 70 x 3, softmax 70 - 10, values 40 x 6; the mask 2 x 5 x 7.
    assert (plain[1], masked[1]) == (210 + 60 + 240, 210 + 60 + 240 + 70)


def test_grouped_query_attention_repeats_keys_and_values():
    q, k = torch.ones(1, 4, 5, 8), torch.ones(1, 2, 5, 8)
    grouped = Call(lambda self, q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True))
    assert math_of(grouped, q, k).macs == 2 * 4 * 5 * 5 * 8


# --- recurrent layers -------------------------------------------------------------------------------------------------


@pytest.mark.rule("math.recurrent")
def test_lstm_by_hand():
    # 3 steps of 4 gates x 8: products with x (5) and h (8), each with a bias, and their sum. Then 3 sigmoids (2 + 1),
    # 2 tanh, 3 products and 1 sum for each of 8.
    mults = 3 * (32 * 13 + 8 * (6 + 2 + 3))
    adds = 3 * (32 * 13 + 32 + 8 * (3 + 1))
    assert count(dense(nn.LSTM(5, 8)), (3, 1, 5)) == (mults, adds)


def test_lstm_without_bias_both_ways_in_two_layers_with_a_projection():
    layer = dense(nn.LSTM(5, 8, 2, bias=False, bidirectional=True, proj_size=3))
    # Both ways, each step: gates from x (5, then 2 x 3) and from the projected h (3), the projection 8 -> 3.
    assert math_of(layer, torch.zeros(4, 1, 5)).macs == 4 * 2 * (32 * (5 + 3) + 24 + 32 * (6 + 3) + 24)


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_cells(cell, gates):
    assert math_of(dense(cell(5, 8)), torch.zeros(1, 5)).macs == gates * 8 * 13


def test_packed_sequences_are_an_error():
    lengths = torch.tensor([3, 2])
    model = Call(lambda self, x: self.l(nn.utils.rnn.pack_padded_sequence(x, lengths)).data, l=nn.LSTM(5, 8))
    with pytest.raises(InputError, match="does not run"):
        trace(model, torch.zeros(3, 2, 5))


# --- element-wise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "mults", "adds"),
    [
        (nn.ELU(), 2, 1),
        (nn.ELU(0.5), 3, 1),
        (nn.ELU(1), 2, 1),  # torch leaves out what it takes anyhow
        (nn.SELU(), 3, 1),
        (nn.CELU(), 2, 1),
        (nn.CELU(0.5), 4, 1),
        (nn.Softplus(), 2, 1),
        (nn.LogSigmoid(), 2, 1),
        (nn.Mish(), 4, 1),
        (nn.Softsign(), 2, 1),  # absolute value, division; 1 +
        (nn.Tanhshrink(), 1, 1),
        (nn.Hardshrink(), 1, 0),
        (nn.Softshrink(), 1, 1),
        (nn.Threshold(0.1, 1.0), 1, 0),
        (nn.RReLU(), 1, 0),
        (torch.sin, 1, 0),
        (torch.atan2, 1, 0),
        (torch.floor, 1, 0),
        (torch.sign, 1, 0),
        (torch.maximum, 0, 1),
        (torch.gt, 0, 1),
        (torch.isnan, 0, 1),
        (torch.remainder, 2, 1),
        (torch.hypot, 3, 1),
        (torch.linalg.cross, 2, 1),
        (torch.nan_to_num, 0, 3),
        (lambda x, y: torch.lerp(x, y, 0.5), 1, 2),
        (lambda x, y: torch.addcmul(x, x, y), 1, 1),
        (lambda x, y: torch.addcmul(x, x, y, value=2), 2, 1),
        (lambda x: x.clamp(0, 1), 2, 0),
        (lambda x: x.clamp(min=0), 1, 0),
        (lambda x: x.masked_fill(x > 0, 1), 0, 1),
        (lambda x, y: torch.where(x > 0, x, y), 0, 1),
        (lambda x: x**3, 1, 0),
    ],
)
def test_elementwise(function, mults, adds):
    of_two = (torch.atan2, torch.maximum, torch.gt, torch.remainder, torch.hypot, torch.linalg.cross)
    inputs = 2 if function in of_two else 1
    if getattr(function, "__code__", None) and function.__code__.co_argcount == 2:
        inputs = 2
    assert count(function, *[(2, 4, 3)] * inputs) == (24 * mults, 24 * adds)


def test_gated_linear_unit_counts_its_output():
    assert count(nn.GLU(1), (2, 6)) == (6 * 3, 6)


@pytest.mark.rule("op.multiply")
def test_bitwise_operations_count_one():
    bits = torch.zeros(2, 3, dtype=torch.int64)
    assert math_of(Call(lambda self, a, b: (a & b) ^ ~b), bits, bits).mults == 18


def test_complex_numbers_are_an_error():
    with pytest.raises(NoFormula, match=r"aten\.mul .*complex"):
        count(lambda x: torch.view_as_complex(x) * 2j, (3, 2))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_stored_complex_numbers_are_an_error_that_names_them(dtype):
    class Filtered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("filter", torch.ones(3, dtype=dtype))

        def forward(self, x):
            return x * self.filter

    with pytest.raises(InputError, match=rf"^'filter' cannot be stored: tensors of {dtype} have no number format"):
        micronet_eval.score(Filtered().eval(), torch.zeros(1, 3))


# --- reductions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.sum(1), (0, 2 * 7)),
        (lambda x: x.prod(1), (2 * 7, 0)),
        (lambda x: x.var(1), (2 * (8 + 2), 2 * (7 + 8 + 7))),  # mean 7 + 1*, 8 differences, 8 squares, 7 + and 1*
        (lambda x: x.std(1), (2 * (8 + 3), 2 * (7 + 8 + 7))),
        (lambda x: x.max(1)[0], (0, 2 * 7)),
        (lambda x: x.max(), (0, 15)),
        (lambda x: x.argmin(1), (0, 2 * 7)),
        (lambda x: x.cumsum(1), (0, 2 * 7)),
        (lambda x: x.cumprod(1), (2 * 7, 0)),
        (lambda x: torch.max(x, x), (0, 16)),
        (lambda x: x.sum().cumsum(0), (0, 15)),  # nothing to add up in one number
        (lambda x: x.t().sort()[0], (0, 16)),  # log2 2
        (lambda x: x.sort(1)[0], (0, 16 * 3)),  # log2 8
        (lambda x: x.median(1)[0], (0, 16 * 3)),
        (lambda x: x.median(), (0, 16 * 4)),
        (lambda x: x.topk(3, 1)[0], (0, 2 * 7 * 2)),  # a heap of 3 has 2 levels
        (lambda x: x.topk(1, 1)[0], (0, 2 * 7)),
        (lambda x: x.logsumexp(1), (2 * 9, 2 * 7)),
        (lambda x: x.log_softmax(1), (2 * 9, 2 * (7 + 8))),
        (lambda x: x.norm(dim=1), (2 * 9, 2 * 7)),
        (lambda x: x.norm(1, dim=1), (2 * 8, 2 * 7)),
        (lambda x: torch.linalg.vector_norm(x, math.inf, 1), (2 * 8, 2 * 7)),
        (lambda x: (x > 0).any(1), (0, 16 + 2 * 7)),
        (lambda x: x.count_nonzero(1), (0, 16 + 2 * 7)),
        (lambda x: x.aminmax(dim=1)[0], (0, 2 * 2 * 7)),
        (lambda x: x.trace(), (0, 1)),
        (lambda x: x.histc(4), (16, 2 * 16)),
        (lambda x: x.cummax(1)[0], (0, 2 * 7)),
        (lambda x: x.cummin(0)[0], (0, 8)),
        (lambda x: x.logcumsumexp(1), (2 * 16, 2 * 7)),
        (lambda x: x.mode(1)[0], (0, 16 * 3)),
        (lambda x: x.nanmedian(0)[0], (0, 16)),
        (lambda x: x.kthvalue(3, 1)[0], (0, 16 * 3)),
        (lambda x: x.kthvalue(1, 0)[0], (0, 16)),
        (lambda x: x.topk(1, 0)[0], (0, 8)),
        (lambda x: torch.var_mean(x, 1)[0], (2 * (8 + 2), 2 * (7 + 8 + 7))),
        (lambda x: torch.std_mean(x, 1)[0], (2 * (8 + 3), 2 * (7 + 8 + 7))),
        (lambda x: torch.dist(x, x), (16 + 1, 16 + 15)),  # differences, squares, sum, root
        (lambda x: torch.linalg.vector_norm(x, -math.inf, 1), (2 * 8, 2 * 7)),
        (lambda x: torch.searchsorted(torch.arange(8.0), x), (0, 16 * 4)),  # 9 places: ceil(log2 9)
        (lambda x: torch.searchsorted(torch.arange(20.0), x), (0, 16 * 5)),
        (lambda x: x.scatter_reduce(1, torch.zeros(2, 4, dtype=torch.int64), x[:, :4], "sum"), (0, 8)),
        (lambda x: torch.bucketize(x, torch.arange(7.0)), (0, 16 * 3)),
        (lambda x: x.scatter_add(1, torch.zeros(2, 4, dtype=torch.int64), x[:, :4]), (0, 8)),
        (lambda x: x.index_add(0, torch.tensor([1]), x[:1]), (0, 8)),
        (lambda x: x.index_put((torch.tensor([1]),), x[:1], accumulate=True), (0, 8)),
        (lambda x: x.index_put((torch.tensor([1]),), x[:1]), (0, 0)),
    ],
)
def test_reductions(function, expected):
    assert count(function, (2, 8)) == expected


def test_folding_adds_where_windows_overlap():
    # 9 windows of 2 x 2 on 4 x 4: 36 elements come to 16 places.
    assert count(lambda x: F.fold(x, 4, 2), (1, 4, 9)) == (0, 20)


# --- norms ------------------------------------------------------------------------------------------------------------


def test_rms_norm_by_hand():
    # 3 rows of 8: squares 8 and their mean 7 + 1*, epsilon 1 +, root 1, scaling 8, weight 8.
    assert count(nn.RMSNorm(8), (3, 8)) == (3 * 26, 3 * 8)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        # k = 6: mults 1 + 6 + 1 + 1 + 6 and a weight of 6; adds 6 + 1 and a bias of 6; sums 5 + 5.
        ("native_layer_norm", ((4, 2, 3), (2, 3), True, None), (4 * 21, 4 * 7, 4 * 10)),
        ("native_layer_norm", ((4, 2, 3), (2, 3), None, True), (4 * 15, 4 * 13, 4 * 10)),
        ("native_group_norm", ((4, 6, 2), None, None, 4, 6, 2, 2), (8 * 15, 8 * 7, 8 * 10)),
        ("native_group_norm", ((4, 6, 2), True, True, 4, 6, 2, 2), (8 * 21, 8 * 13, 8 * 10)),
        ("native_batch_norm", ((1, 4, 6), True, None, None, None, True), (4 * 21, 4 * 7, 4 * 10)),
        ("native_batch_norm", ((1, 4, 6), None, True, None, None, True), (4 * 15, 4 * 13, 4 * 10)),
        ("native_batch_norm", ((1, 4, 6), True, True, True, True, False), (24, 0, 24)),
    ],
)
def test_norms_by_their_formulas(name, arguments, expected):
    shape, *others = arguments
    x = SimpleNamespace(shape=shape, numel=math.prod(shape))
    cost = FORMULAS[f"aten.{name}"](SimpleNamespace(name=f"aten.{name}", args=(x, *others), out=x))
    assert (cost.mults, cost.adds, cost.accumulations, cost.macs) == (*expected, 0)


@pytest.mark.parametrize("scales", [1, 3])
def test_scales_that_are_found_while_running(scales):
    op = SimpleNamespace(inputs=[SimpleNamespace(numel=12)], out=SimpleNamespace(numel=scales))
    cost = FORMULAS["quantized_decomposed.choose_qparams"](op)
    # Smallest and largest of k: twice k - 1 comparisons; for each scale 2 multiplications and 2 additions.
    assert (cost.mults, cost.adds, cost.accumulations) == (2 * scales, 2 * (12 - scales) + 2 * scales, 0)


@pytest.mark.parametrize(("weight", "each"), [(ones(8), 8), (None, 0)])
def test_rms_norm_as_one_operation(weight, each):
    op = SimpleNamespace(args=(torch.ones(3, 8), (8,), weight))
    op.args[0].numel = 24  # as a traced value has it
    cost = FORMULAS["aten._fused_rms_norm"](op)
    assert (cost.mults, cost.adds, cost.accumulations) == (3 * (18 + each), 3, 3 * 7)


def test_local_response_norm():
    # Square, a mean of 3 (2 + 1*), times alpha, plus k, to the power, division.
    assert count(nn.LocalResponseNorm(3), (1, 4, 2, 2)) == (16 * 5, 16 * 3)


def test_standardized_weights_cost_nothing():
    """Operations on weights alone are done before inference."""

    def forward(self, x):
        weight = F.batch_norm(self.w.view(1, 6, -1), None, None, training=True).view_as(self.w)
        return F.conv2d(x, weight)

    weight = nn.Parameter(torch.arange(24.0).view(6, 4, 1, 1))
    assert count(Call(forward, w=weight), (1, 4, 2, 2)) == (4 * 24, 4 * 18)


# --- pooling, interpolation, moves ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.MaxPool1d(2), (1, 3, 8), (0, 12)),
        (nn.MaxPool3d(2), (1, 1, 4, 4, 4), (0, 8 * 7)),
        (nn.AvgPool1d(4), (1, 3, 8), (6, 6 * 3)),
        (nn.AvgPool3d(2), (1, 1, 4, 4, 4), (8, 8 * 7)),
        (nn.AdaptiveAvgPool1d(3), (1, 2, 5), (6, 2 * (7 - 3))),  # windows of 2, 3, 2
        (nn.AdaptiveAvgPool3d(2), (1, 1, 4, 4, 4), (8, 8 * 7)),
        (nn.AdaptiveMaxPool1d(3), (1, 2, 5), (0, 2 * (7 - 3))),
        (nn.AdaptiveMaxPool2d(2), (1, 1, 4, 4), (0, 12)),
        (nn.AdaptiveMaxPool3d(2), (1, 1, 4, 4, 4), (0, 8 * 7)),
        # 8 squares, 4 means of 2 times 2, and as torch takes the root: sign, absolute value, ReLU, two products, power.
        (nn.LPPool1d(2, 2), (1, 1, 8), (8 + 4 + 4 * 6, 4)),
    ],
    ids=str,
)
def test_pooling(layer, shape, expected):
    assert count(layer, shape) == expected


@pytest.mark.parametrize(
    ("mode", "shape", "taps"),
    [
        ("nearest", (1, 2, 4, 4), 0),
        ("nearest-exact", (1, 2, 4, 4), 0),
        ("linear", (1, 2, 4), 2),
        ("bilinear", (1, 2, 4, 4), 4),
        ("bicubic", (1, 2, 4, 4), 16),
        ("trilinear", (1, 2, 4, 4, 4), 8),
    ],
)
@pytest.mark.rule("op.interpolation")
def test_interpolation(mode, shape, taps):
    outputs = 2 * 8 ** (len(shape) - 2)
    expected = (taps * outputs, max(taps - 1, 0) * outputs)
    assert count(lambda x: F.interpolate(x, scale_factor=2, mode=mode), shape) == expected


def test_antialiased_interpolation_goes_along_the_rows_then_the_columns():
    # 8 -> 4: filters of 4 taps, on 8 x 4 and then on 4 x 4 elements.
    expected = (4 * 48, 3 * 48)
    assert (
        count(lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), (1, 1, 8, 8)) == expected
    )


@pytest.mark.parametrize(
    ("mode", "shape", "size", "taps", "elements"),
    [
        ("bicubic", (1, 2, 16, 12), (8, 6), 8, 2 * 16 * 6 + 2 * 8 * 6),  # half as large: twice 4 taps
        ("bicubic", (1, 1, 2, 2), (1, 1), 2, 2 + 1),  # no more taps than elements
        ("bilinear", (1, 1, 4, 4), (8, 8), 2, 4 * 8 + 8 * 8),
    ],
)
def test_taps_of_antialiased_interpolation(mode, shape, size, taps, elements):
    counted = count(lambda x: F.interpolate(x, size, mode=mode, antialias=True), shape)
    assert counted == (taps * elements, (taps - 1) * elements)


@pytest.mark.parametrize("pool", [F.avg_pool2d, F.avg_pool3d])
def test_a_window_of_one_size_has_it_in_every_dimension(pool):
    d = 2 if pool is F.avg_pool2d else 3
    # 2 ** d windows of 3 ** d.
    assert count(lambda x: pool(x, [3]), (1, 1, *[6] * d)) == (2**d, 2**d * (3**d - 1))


def test_sampling_by_16_taps_and_in_three_dimensions():
    sample = lambda x, g, mode: F.grid_sample(x, g, mode, align_corners=False)  # noqa: E731
    # 6 places x 2: 2 * and 1 +, 4 polynomials of 3 and 3; 16 weights; 3 channels of 16 taps.
    bicubic = count(lambda x, g: sample(x, g, "bicubic"), (1, 3, 8, 8), (1, 2, 3, 2))
    assert bicubic == (6 * (4 + 24 + 16 + 48), 6 * (2 + 24 + 45))
    # 6 places x 3: 2 * and 1 + and 2 distances; 8 weights; 3 channels of 8 taps.
    assert count(lambda x, g: sample(x, g, "bilinear"), (1, 3, 4, 4, 4), (1, 1, 2, 3, 3)) == (
        6 * (6 + 8 + 24),
        6 * (3 + 6 + 21),
    )


def test_a_grid_of_an_affine_map():
    op = SimpleNamespace(out=SimpleNamespace(shape=(1, 2, 5, 2), numel=20))
    cost = FORMULAS["aten.affine_grid_generator"](op)
    assert (cost.mults, cost.adds, cost.accumulations) == (40, 0, 40)  # 20 coordinates of 2 terms and a shift


def test_sampling_on_a_grid():
    # 6 places in 2 dimensions: each coordinate 2 * and 1 + and 2 distances, 4 weights; 3 channels of 4 taps.
    shapes = (1, 3, 8, 8), (1, 2, 3, 2)
    sample = lambda x, g, mode: F.grid_sample(x, g, mode, align_corners=False)  # noqa: E731
    assert count(lambda x, g: sample(x, g, "bilinear"), *shapes) == (6 * (4 + 4 + 12), 6 * (6 + 9))
    assert count(lambda x, g: sample(x, g, "nearest"), *shapes) == (6 * 4, 6 * 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.roll(1, 2),
        lambda x: x.flip(1),
        lambda x: F.pixel_shuffle(x, 2),
        lambda x: F.pixel_unshuffle(x, 2),
        lambda x: F.unfold(x, 2),
        lambda x: x.tril(),
        lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
        lambda x: F.pad(x, (1, 1, 1, 1), "replicate"),
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x[:, [0, 1]],
    ],
)
def test_moves_are_free(function):
    assert count(function, (1, 4, 4, 4)) == (0, 0)


# --- permutations -----------------------------------------------------------------------------------------------------


def shuffle(x, groups=2):
    """As ShuffleNet has it."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.channel_shuffle(x, 2),
        shuffle,
        lambda x: x[:, torch.tensor([2, 0, 1, 3, 5, 4])],
        lambda x: x.index_select(1, torch.tensor([2, 0, 1, 3, 5, 4])),
    ],
    ids=["ChannelShuffle", "view, transpose, view", "index", "index_select"],
)
@pytest.mark.rule("op.permutation")
def test_a_permutation_of_channels_is_one_multiplication_an_element(function):
    assert count(function, (1, 6, 3, 3)) == (54, 0)


@pytest.mark.rule("storage.permutation")
def test_a_permutation_stores_where_its_elements_come_from():
    def report(function):
        return micronet_eval.score(Call(lambda self, x: function(x)), torch.zeros(1, 6, 3, 3))

    # Places 0 to 5 take 3 bits. Two channels of three groups: 0 2 4 1 3 5.
    assert report(lambda x: F.channel_shuffle(x, 3)).storage.bits == 6 * 3
    assert report(shuffle).storage.bits == 6 * 3
    assert report(lambda x: x[:, torch.tensor([2, 0, 1, 3, 5, 4])]).storage.bits == 6 * 3  # its own table
    assert report(lambda x: shuffle(F.channel_shuffle(x, 2))).storage.bits == 6 * 3  # the same twice: stored once
    assert report(lambda x: F.channel_shuffle(F.channel_shuffle(x, 2), 3)).storage.bits == 2 * 6 * 3
    recorded = trace(nn.ChannelShuffle(3), torch.arange(6.0).view(1, 6, 1, 1))
    (op,) = (op for op in recorded.ops if permutation_of(op))
    assert list(permutation_of(op)) == F.channel_shuffle(torch.arange(6.0).view(1, 6, 1, 1), 3).flatten().tolist()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: shuffle(x, 1),
        lambda x: shuffle(x, 4),
        lambda x: F.channel_shuffle(x, 1),
        lambda x: x.transpose(2, 3),  # whole dimensions change places
        lambda x: x.transpose(2, 3).reshape(1, 4, 9),
        lambda x: x.view(1, 2, 2, 3, 3).transpose(1, 2).transpose(1, 2).reshape(1, 4, 3, 3),  # there and back again
        lambda x: x.permute(0, 2, 3, 1).reshape(1, 4, 3, 3),  # mixes channels with places
    ],
)
def test_what_only_looks_like_a_permutation_is_free(function):
    assert count(function, (1, 4, 3, 3)) == (0, 0)
    ops = trace(Call(lambda self, x: function(x)), torch.zeros(1, 4, 3, 3)).ops
    assert all(permutation_of(op) == () for op in ops)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, places, rows: x[places],  # the places are computed
        lambda x, places, rows: x.index_select(0, places),
        lambda x, places, rows: x[rows, rows],  # two tables: single elements are picked
    ],
)
def test_a_look_up_by_what_is_no_single_table_is_no_permutation(function):
    picked = Call(lambda self, x, places: function(x, places, self.rows))
    picked.register_buffer("rows", torch.tensor([[1, 0], [0, 1]]))
    places = torch.tensor([1, 0])
    assert math_of(picked, torch.ones(2, 2), places).mults == 0


@pytest.mark.parametrize("kept", [[True, True, True], [True, False, True]])
def test_a_constant_mask_as_an_index_picks_rows_in_their_order(kept):
    """It is no permutation, even where it takes all."""
    picked = Call(lambda self, x: x[self.every].relu())
    picked.register_buffer("every", torch.tensor(kept))
    assert math_of(picked, torch.ones(3, 4)).mults == 4 * sum(kept)  # the ReLU's


@pytest.mark.parametrize("forward", [lambda self, x: x[x > 0], lambda self, x: (x > 0)[x > 0]])
def test_a_computed_mask_as_an_index_is_refused(forward):
    with pytest.raises(InputError, match=r"aten\.index depends on values"):
        math_of(Call(forward), torch.ones(3))


def test_places_beyond_a_dimension_are_no_permutation_of_it():
    # 0 1 2 / 3 4 5 becomes 0 3 1 / 4 2 5: in the second dimension 0, 3, 1 of three.
    assert count(lambda x: x.t().reshape(2, 3), (2, 3)) == (0, 0)


def test_shufflenet_pays_for_its_shuffles():
    with without_weights():
        model = get_model("shufflenet_v2_x0_5")
    recorded = trace(model, torch.zeros(1, 3, 224, 224))
    # One shuffle a unit: 4 of 48 channels, 8 of 96, 4 of 192.
    assert sum(len(permutation_of(op)) for op in recorded.ops) == 4 * 48 + 8 * 96 + 4 * 192
    assert micronet_eval.score(model, torch.zeros(1, 3, 224, 224)).storage.overhead_bits == 48 * 6 + 96 * 7 + 192 * 8


# --- what a forward may do --------------------------------------------------------------------------------------------


def test_numbers_written_in_the_forward_keep_their_values():
    def forward(self, x):
        if torch.tensor([3, 4], device=x.device).sum().item() == 7:
            return x * 2
        return x @ x

    assert count(Call(forward), (3, 3)) == (9, 0)


def test_a_choice_by_the_values_of_the_input_is_an_error():
    with pytest.raises(InputError, match="depends on values that are not known"):
        count(Call(lambda self, x: x * 2 if x.sum() > 0 else x), (3,))


def test_shapes_that_depend_on_constants_are_known():
    model = Call(lambda self, x: x[:, self.keep.nonzero()[:, 0]] * 2, keep=torch.tensor([1, 0, 1, 1]))
    assert count(model, (2, 4)) == (6, 0)


def test_named_inputs():
    model = Call(lambda self, a, b=None: a if b is None else a * b)
    assert account(trace(model, {"b": torch.ones(3), "a": torch.ones(3)}), FORMULAS).math.mults == 3


# --- laws -------------------------------------------------------------------------------------------------------------

LAYERS = {
    "convolution": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
    "linear": lambda: nn.Linear(6, 6),
    "gelu": nn.GELU,
    "batch norm": lambda: nn.BatchNorm2d(4),
    "layer norm": lambda: nn.LayerNorm(6),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "pooling": lambda: nn.MaxPool2d(3, 1, 1),
    "softmax": lambda: nn.Softmax(1),
    "shuffle": lambda: nn.ChannelShuffle(2),
}
"""Layers that take [N, 4, 6, 6] to the same shape."""
NO_OPS = {"dropout": nn.Dropout, "dropout2d": nn.Dropout2d, "identity": nn.Identity}

chains = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4)
few = settings(max_examples=25, deadline=None)


def build(names):
    return nn.Sequential(*(dense({**LAYERS, **NO_OPS}[name]()) for name in names))


def of(model, batch=1):
    m = math_of(model, torch.zeros(batch, 4, 6, 6))
    return m.mults, m.adds, m.macs, m.ops32


@few
@given(chains, chains)
def test_cost_is_additive(first, second):
    parts = of(build(first)), of(build(second))
    assert of(nn.Sequential(build(first), build(second))) == tuple(map(sum, zip(*parts, strict=True)))


@few
@given(chains, st.integers(1, 5))
def test_cost_is_linear_in_the_batch(names, batch):
    assert of(build(names), batch) == tuple(batch * figure for figure in of(build(names)))


@few
@given(chains, st.data())
def test_what_does_nothing_in_evaluation_costs_nothing(names, data):
    padded = list(names)
    for name in data.draw(st.lists(st.sampled_from(sorted(NO_OPS)), min_size=1, max_size=3)):
        padded.insert(data.draw(st.integers(0, len(padded))), name)
    assert of(build(padded)) == of(build(names))


@few
@given(st.sampled_from(["convolution", "depthwise", "transposed", "linear"]), st.lists(st.integers(0, 35), max_size=40))
def test_a_masked_weight_never_costs_more(name, zeros):
    layer = dense(LAYERS[name]())
    before = account(trace(layer, torch.zeros(1, 4, 6, 6)), FORMULAS, freebie=False)
    with torch.no_grad():
        layer.weight.view(-1)[zeros] = 0
    after = account(trace(layer, torch.zeros(1, 4, 6, 6)), FORMULAS, freebie=False)
    assert after.math.mults <= before.math.mults
    assert after.math.adds <= before.math.adds
    assert after.storage.bits <= before.storage.bits
    assert (after.math.mults < before.math.mults) == bool(zeros)


@few
@given(
    st.sampled_from(["convolution", "depthwise", "transposed", "linear"]),
    st.integers(2, 16),
    st.integers(2, 16),
    st.integers(1, 8),
    st.booleans(),
)
def test_a_narrower_format_never_costs_more(name, weight_bits, activation_bits, fewer, of_weight):
    def quantized(weight_bits, activation_bits):
        layer = dense(LAYERS[name]())
        parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(weight_bits, -2))
        model = nn.Sequential(FixedPointQuantizer(activation_bits, -4), layer)
        return account(trace(model, torch.zeros(1, 4, 6, 6)), FORMULAS, freebie=False)

    wide = quantized(weight_bits, activation_bits)
    narrow = quantized(max(2, weight_bits - fewer * of_weight), max(2, activation_bits - fewer * (not of_weight)))
    assert narrow.math.ops32 <= wide.math.ops32
    assert narrow.storage.bits <= wide.storage.bits
    if of_weight and weight_bits > 2:
        assert narrow.storage.bits < wide.storage.bits
