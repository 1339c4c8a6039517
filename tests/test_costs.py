"""Every formula of the rules against numbers counted by hand, and that the count depends on nothing else."""

import copy
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from micronet_eval.costs import FORMULAS, Cost, NoFormula
from micronet_eval.scoring import account
from micronet_eval.structure import Mask
from micronet_eval.trace import trace


def module(forward, **members):
    """A module with this forward(self, ...), parameters, buffers and submodules."""
    made = nn.Module()
    for name, member in members.items():
        if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
            made.register_buffer(name, member)
        else:
            setattr(made, name, member)
    made.forward = MethodType(forward, made)
    return made


def math_of(model, *inputs):
    return account(trace(model, inputs), FORMULAS, freebie=False).math


def count(model, *shapes):
    """Multiplications and additions on ones of these shapes."""
    math = math_of(model, *(torch.ones(shape) for shape in shapes))
    return math.mults, math.adds


def dense(layer):
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    return layer


# --- dot products -----------------------------------------------------------------------------------------------------


@pytest.mark.rule("math.dot-product")
def test_convolution_with_bias():
    # 8 x 6 x 6 outputs of 27 weights: 27 multiplications, 26 additions and the bias; those with padding count.
    assert count(dense(nn.Conv2d(3, 8, 3, padding=1)), (1, 3, 6, 6)) == (288 * 27, 288 * 27)


@pytest.mark.rule("math.dot-product")
def test_convolution_without_bias_adds_one_less_an_output():
    assert count(dense(nn.Conv2d(3, 8, 3, padding=1, bias=False)), (1, 3, 6, 6)) == (288 * 27, 288 * 26)


def test_convolution_with_stride_and_groups():
    # 9 -> 4 by stride 2; 6 x 4 x 4 outputs, each of 2 channels x 9 weights.
    assert count(dense(nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False)), (1, 4, 9, 9)) == (96 * 18, 96 * 17)


def test_depthwise_convolution():
    assert count(dense(nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False)), (1, 5, 4, 4)) == (80 * 9, 80 * 8)


def test_convolution_with_dilation():
    # 7 -> 3 by a kernel that spans 5.
    assert count(dense(nn.Conv2d(1, 1, 3, dilation=2, bias=False)), (1, 1, 7, 7)) == (9 * 9, 9 * 8)


def test_convolution_in_one_dimension():
    assert count(dense(nn.Conv1d(4, 6, 3)), (1, 4, 8)) == (36 * 12, 36 * 12)


@pytest.mark.rule("math.zero-weights")
def test_sparse_convolution_with_an_output_channel_without_weights():
    layer = dense(nn.Conv2d(2, 3, 1))
    layer.weight.data = torch.tensor([[1.0, 2], [3, 0], [0, 0]]).view(3, 2, 1, 1)
    # At 4 positions: 2 + 1 + 0 multiplications; 1 + 0 + 0 additions and the bias of the first two only.
    assert count(layer, (1, 2, 2, 2)) == (4 * 3, 4 * 3)


def test_sparse_convolution_without_bias_and_an_output_channel_without_weights():
    layer = nn.Conv2d(2, 3, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2], [3, 0], [0, 0]]).view(3, 2, 1, 1)
    assert count(layer, (1, 2, 2, 2)) == (4 * 3, 4 * 1)


def test_sparse_convolution_with_groups():
    layer = nn.Conv2d(4, 2, 1, groups=2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0], [1, 1]]).view(2, 2, 1, 1)
    assert count(layer, (1, 4, 3, 3)) == (9 * 3, 9 * 1)


@pytest.mark.rule("math.activations")
def test_zero_activations_count():
    layer = dense(nn.Linear(4, 3))
    math = math_of(layer, torch.zeros(1, 4))
    assert (math.mults, math.adds) == (12, 12)


def test_linear_on_tokens():
    # 5 tokens x 3 outputs of 4 weights: 3 additions and the bias.
    assert count(dense(nn.Linear(4, 3)), (1, 5, 4)) == (60, 60)


def test_linear_without_bias():
    assert count(dense(nn.Linear(4, 3, bias=False)), (1, 4)) == (12, 9)


def test_sparse_linear_with_an_output_without_weights():
    layer = dense(nn.Linear(3, 3))
    layer.weight.data = torch.tensor([[1.0, 2, 3], [0, 0, 4], [0, 0, 0]])
    # 3 + 1 multiplications; 2 + 0 additions and two biases.
    assert count(layer, (1, 3)) == (4, 4)


def test_product_of_two_activations():
    # 2 x 3 x 5 outputs of 4 terms.
    assert count(module(lambda self, a, b: a @ b), (2, 3, 4), (2, 4, 5)) == (120, 90)


def test_product_with_a_sparse_constant_on_either_side():
    matrix = torch.tensor([[1.0, 0], [1, 0], [1, 1], [0, 0]])
    # On the right its columns feed the outputs: 3 + 1 terms. On the left its rows do: 1 + 1 + 2 + 0 terms.
    assert count(module(lambda self, x: x @ self.m, m=matrix), (5, 4)) == (5 * 4, 5 * 2)
    assert count(module(lambda self, x: self.m @ x, m=matrix), (2, 5)) == (5 * 4, 5 * 1)


def test_batched_product_with_a_sparse_constant():
    matrices = torch.tensor([[[1.0, 0], [1, 1]], [[0, 0], [0, 1]]])
    # Columns of 2, 1, 0, 1 terms, for 3 rows.
    assert count(module(lambda self, x: torch.bmm(x, self.m), m=matrices), (2, 3, 2)) == (3 * 4, 3 * 1)


@pytest.mark.rule("math.attention")
def test_attention_counts_both_products():
    q = torch.ones(1, 2, 5, 4)
    # 2 heads of 5 x 5 x 4 for the weights, and the same for the values.
    assert math_of(module(lambda self, q: F.scaled_dot_product_attention(q, q, q)), q).macs == 2 * 2 * 5 * 5 * 4


def test_macs_are_the_multiplications_of_dot_products():
    model = nn.Sequential(dense(nn.Linear(4, 3)), nn.ReLU())
    assert math_of(model, torch.ones(1, 4)).macs == 12
    assert math_of(model, torch.ones(1, 4)).mults == 12 + 3


# --- element-wise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "mults", "adds"),
    [
        (nn.ReLU(), 1, 0),
        (nn.LeakyReLU(), 1, 0),
        (nn.PReLU(), 1, 0),
        (nn.PReLU(4), 1, 0),
        (nn.ReLU6(), 2, 0),
        (nn.Hardtanh(), 2, 0),
        (nn.Sigmoid(), 2, 1),
        (nn.SiLU(), 3, 1),
        (nn.Hardsigmoid(), 2, 1),
        (nn.Hardswish(), 3, 1),
        (nn.Tanh(), 1, 0),
        (nn.GELU(), 4, 1),
        (nn.GELU("tanh"), 4, 1),
    ],
    ids=str,
)
@pytest.mark.rule("op.relu", "op.relu6", "op.sigmoid", "op.silu", "op.hard", "op.gelu")
def test_activation(activation, mults, adds):
    assert count(activation, (1, 4, 3, 2)) == (24 * mults, 24 * adds)


def test_relu_counts_one_multiplication_an_element():
    assert count(nn.ReLU(), (1, 3, 2)) == (6, 0)


@pytest.mark.parametrize("function", [F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu])
def test_relu_counts_the_same_however_it_is_written(function):
    assert count(module(lambda self, x: function(x)), (1, 6)) == (6, 0)


@pytest.mark.parametrize("function", [torch.exp, torch.log, torch.sqrt, torch.erf], ids=lambda f: f.__name__)
@pytest.mark.rule("op.transcendental")
def test_transcendental_function_counts_one_multiplication(function):
    assert count(module(lambda self, x: function(x)), (2, 3)) == (6, 0)


@pytest.mark.parametrize(
    ("function", "mults", "adds"),
    [
        (lambda a, b: a + b, 0, 1),
        (lambda a, b: a - b, 0, 1),
        (lambda a, b: a * b, 1, 0),
        (lambda a, b: a / b, 1, 0),
        (lambda a, b: a * 3, 1, 0),
        (lambda a, b: 1 - a, 0, 1),
        (lambda a, b: torch.add(a, b, alpha=2), 1, 1),  # b is scaled first
    ],
    ids=["add", "subtract", "multiply", "divide", "scale", "subtract from a number", "add scaled"],
)
@pytest.mark.rule("op.multiply", "op.add")
def test_arithmetic(function, mults, adds):
    assert count(module(lambda self, a, b: function(a, b)), (2, 3), (2, 3)) == (6 * mults, 6 * adds)


def test_arithmetic_counts_the_elements_of_the_broadcast_output():
    assert count(module(lambda self, a, b: a * b), (1, 4, 1, 1), (1, 4, 3, 3)) == (36, 0)


@pytest.mark.rule("op.add")
def test_residual_add_counts_one_addition_an_element():
    # The layer: 4 multiplications and 4 additions for each of 4 outputs; then 4 additions.
    assert count(module(lambda self, x: x + self.layer(x), layer=dense(nn.Linear(4, 4))), (1, 4)) == (16, 16 + 4)


# --- reductions and normalization -------------------------------------------------------------------------------------


@pytest.mark.rule("op.mean")
def test_average_pooling():
    # 4 windows of 9: 8 additions and 1 multiplication each.
    assert count(nn.AvgPool2d(3), (1, 1, 6, 6)) == (4, 32)


def test_average_pooling_to_one():
    assert count(nn.AdaptiveAvgPool2d(1), (1, 4, 8, 8)) == (4, 4 * 63)


def test_adaptive_average_pooling_with_uneven_windows():
    # 5 -> 3: windows 0-1, 1-3, 3-4 of 2, 3, 2 rows; 7 x 7 elements into 9 outputs.
    assert count(nn.AdaptiveAvgPool2d(3), (1, 2, 5, 5)) == (2 * 9, 2 * (49 - 9))


def test_adaptive_average_pooling_to_more_than_there_is():
    # 2 -> 3: windows of 1, 2, 1; 4 x 4 elements into 9 outputs.
    assert count(nn.AdaptiveAvgPool2d(3), (1, 1, 2, 2)) == (9, 16 - 9)


@pytest.mark.rule("op.mean")
def test_mean_over_some_dimensions():
    assert count(module(lambda self, x: x.mean((2, 3))), (1, 4, 3, 3)) == (4, 4 * 8)


@pytest.mark.rule("op.maximum")
def test_max_pooling_counts_comparisons():
    assert count(nn.MaxPool2d(3, 2, 1), (1, 2, 8, 8)) == (0, 2 * 16 * 8)


def test_maximum_over_a_dimension():
    assert count(module(lambda self, x: x.amax(1)), (2, 5)) == (0, 2 * 4)


@pytest.mark.rule("op.softmax")
def test_softmax():
    # For each of 3 rows of 5: 5 exponentials, 4 additions, 5 divisions.
    assert count(nn.Softmax(-1), (3, 5)) == (3 * 10, 3 * 4)


@pytest.mark.rule("op.norm")
def test_layer_norm():
    # For each of 3 rows of 8: mean 7 + and 1 *, centring 8 +, variance 8 *, 7 + and 1 *, epsilon 1 +,
    # reciprocal root 1 *, scaling 8 *, weight 8 *, bias 8 +.
    assert count(nn.LayerNorm(8), (3, 8)) == (3 * 27, 3 * 31)


def test_layer_norm_without_weight_and_bias():
    assert count(nn.LayerNorm(8, elementwise_affine=False), (3, 8)) == (3 * 19, 3 * 23)


def test_group_norm_is_layer_norm_over_groups_of_channels():
    # 2 groups of 2 channels x 4: k = 8.
    assert count(nn.GroupNorm(2, 4), (1, 4, 2, 2)) == (2 * 27, 2 * 31)


@pytest.mark.rule("op.norm")
def test_batch_norm_that_is_not_merged():
    assert count(nn.BatchNorm2d(4), (1, 4, 3, 3)) == (36, 36)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4), nn.BatchNorm2d(4, affine=False, track_running_stats=False)])
def test_norm_by_the_statistics_of_the_input_counts_them(norm):
    # For each of 4 channels of 9: as layer norm without weight and bias, 1 + 9 + 1 + 1 + 9 and 8 + 9 + 8 + 1. To say
    # that there is no formula would be right, too.
    try:
        assert count(norm, (1, 4, 3, 3)) == (4 * 21, 4 * 26)
    except NoFormula as error:
        assert "batch_norm" in str(error)


# --- free, and unknown ------------------------------------------------------------------------------------------------


MOVES = {
    "view": lambda x: x.view(1, -1),
    "reshape": lambda x: x.reshape(4, -1),
    "transpose": lambda x: x.transpose(1, 2).contiguous(),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x]),
    "slice": lambda x: x[:, 1:3],
    "chunk": lambda x: x.chunk(2, 1)[0],
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "upsample": lambda x: F.interpolate(x, scale_factor=2),
    "dropout": lambda x: F.dropout(x, training=False),
    "flatten": lambda x: x.flatten(1),
    "squeeze": lambda x: x.squeeze(0),
    "expand": lambda x: x.expand(3, -1, -1, -1),
    "clone": lambda x: x.clone(),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.rule("op.free")
def test_moving_values_is_free(name):
    assert count(module(lambda self, x: MOVES[name](x)), (1, 4, 2, 2)) == (0, 0)


def test_dropout_is_free_in_training_mode_too():
    assert count(nn.Dropout().train(), (1, 4)) == (0, 0)


def test_embedding_is_free():
    assert math_of(nn.Embedding(10, 4), torch.zeros(1, 5, dtype=torch.int64)).ops32 == 0


@pytest.mark.rule("op.free")
def test_free_operations_come_with_a_reason():
    coverage = account(trace(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.ones(1, 2, 2)), FORMULAS).coverage
    assert coverage.executed == 2
    assert coverage.priced == 1
    assert list(coverage.free) == ["aten.view"]
    assert coverage.free["aten.view"]


@pytest.mark.rule("math.unknown")
def test_unknown_operation_is_an_error_that_names_it_and_its_module():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), module(lambda self, x: torch.special.i0(x))))
    with pytest.raises(NoFormula, match=r"aten\.i0 in module '1\.1'"):
        count(model, (1, 4))


def test_unknown_operation_outside_of_any_submodule_is_said_to_be_in_the_models_forward():
    with pytest.raises(NoFormula, match=r"aten\.i0 in the model's own forward"):
        count(module(lambda self, x: torch.special.i0(x)), (1, 4))


@pytest.mark.parametrize(
    ("function", "mults", "adds"),
    [
        (lambda x: torch.addmv(x[0], x, x[0], alpha=0.3), 16 + 4, 16),
        (lambda x: torch.addmv(x[0], x, x[0], alpha=0.3, beta=0), 16 + 4, 12),
        (lambda x: torch.addbmm(x, x[None], x[None], beta=0.3), 64 + 16, 64),
        (lambda x: torch.addr(x, x[0], x[1], alpha=0.3, beta=0.7), 16 + 2 * 16, 16),
        (lambda x: torch.index_add(x, 0, torch.tensor([1, 2]), x[:2], alpha=0.3), 8, 8),
        (lambda x: torch.index_add(x, 0, torch.tensor([1, 2]), x[:2]), 0, 8),
        (lambda x: x.scatter_reduce(0, torch.zeros(4, 4, dtype=torch.int64), x, "mean"), 16, 16),
        (lambda x: x.scatter_reduce(0, torch.zeros(4, 4, dtype=torch.int64), x, "sum"), 0, 16),
        (lambda x: x.scatter_reduce(0, torch.zeros(2, 4, dtype=torch.int64), x, "prod"), 8, 0),
        (lambda x: x.scatter_reduce(0, torch.zeros(2, 4, dtype=torch.int64), x, "amax"), 0, 8),
        (lambda x: x.scatter(0, torch.zeros(2, 4, dtype=torch.int64), x), 0, 0),
        (lambda x: x.scatter(0, torch.zeros(2, 4, dtype=torch.int64), x, reduce="add"), 0, 8),
        (lambda x: (x + 0).scatter_(0, torch.zeros(2, 4, dtype=torch.int64), x, reduce="multiply"), 8, 16),
        (lambda x: x.scatter(0, torch.zeros(2, 4, dtype=torch.int64), 0.3, reduce="multiply"), 8, 0),
    ],
)
def test_factors_of_sums_multiply(function, mults, adds):
    found = math_of(module(lambda self, x: function(x)), torch.zeros(4, 4))
    assert (found.mults, found.adds) == (mults, adds)


def test_the_number_that_is_scattered_is_stored_and_counts_its_width():
    def scattered(number):
        table = torch.zeros(4, 4, dtype=torch.int64)
        model = module(lambda self, x: x.scatter(0, table, number, reduce="multiply"))
        return account(trace(model, torch.zeros(4, 4)), FORMULAS)

    by_number, by_shift = scattered(0.3), scattered(0.5)
    assert by_number.storage.bits - by_shift.storage.bits == 16  # the freebie's
    assert by_number.storage.parameters - by_shift.storage.parameters == 1


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(3, 0), (1, 3)),
        (lambda: nn.Linear(3, 0, bias=False), (2, 5, 3)),
        (lambda: nn.Conv2d(3, 0, 1), (1, 3, 4, 4)),
        (lambda: nn.ConvTranspose2d(3, 0, 1), (1, 3, 4, 4)),
    ],
)
def test_a_layer_without_outputs_costs_nothing(layer, shape):
    found = account(trace(layer(), torch.zeros(shape)), FORMULAS)
    assert (found.math.ops32, found.storage.bits) == (0, 0)


def test_formula_of_a_plugin_makes_an_unknown_operation_count():
    added = {**FORMULAS, "aten.i0": lambda op: Cost(mults=2 * op.out.numel, adds=op.out.numel)}
    math = account(trace(module(lambda self, x: torch.special.i0(x)), torch.ones(1, 4)), added).math
    assert (math.mults, math.adds) == (8, 4)


def test_two_parameters_that_are_added_cost_nothing():
    """What is computed from parameters alone is computed once, before inference."""
    model = module(lambda self, x: x * (self.a + self.b).exp(), a=nn.Parameter(torch.ones(4)), b=torch.ones(4))
    assert count(model, (1, 4)) == (4, 0)
    assert account(trace(model, torch.ones(1, 4)), FORMULAS).coverage.folded == 2


# --- folded parameters ------------------------------------------------------------------------------------------------


@pytest.mark.rule("math.parameters")
def test_masked_weight_counts_as_sparse():
    layer = dense(nn.Linear(4, 2, bias=False))
    parametrize.register_parametrization(layer, "weight", Mask(torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])))
    assert count(layer, (1, 4)) == (3, 1)


def test_transposed_weight_counts_as_sparse_by_its_outputs():
    weight = nn.Parameter(torch.tensor([[1.0, 1, 0], [1, 0, 0]]))
    # x (2) times weight: outputs of 2, 1, 0 terms. x (3) times weight transposed: outputs of 2, 1 terms.
    assert count(module(lambda self, x: x @ self.w, w=weight), (1, 2)) == (3, 1)
    assert count(module(lambda self, x: x @ self.w.t(), w=weight), (1, 3)) == (3, 1)


def test_weight_that_is_zeroed_in_place_counts_as_sparse():
    def forward(self, x):
        weight = self.w.clone()
        weight[:, :2] = 0
        return F.linear(x, weight)

    assert count(module(forward, w=nn.Parameter(torch.ones(3, 4))), (1, 4)) == (3 * 2, 3 * 1)


# --- in-place ---------------------------------------------------------------------------------------------------------


def test_in_place_operations_count_as_the_others():
    def forward(self, x):
        return x.mul(2).add_(1).relu_().mul_(3)

    assert count(module(forward), (1, 4)) == (4 + 4 + 4, 4)


def test_in_place_operations_on_views_count_the_elements_of_the_view():
    def forward(self, x):
        y = x * 2
        y[:, :1].relu_()
        y[:, 1:].add_(1)
        return y

    assert count(module(forward), (1, 4)) == (4 + 1, 3)


def test_what_is_written_through_a_view_is_no_constant_any_more():
    def forward(self, x):
        y = torch.zeros(4, 4)
        y[:2] = x
        return x @ y  # both are activations, so that the zeros count

    assert count(module(forward), (2, 4)) == (2 * 4 * 4, 2 * 4 * 3)


# --- the same in every mode -------------------------------------------------------------------------------------------


def network():
    """Something of everything that behaves differently in training."""
    return nn.Sequential(
        dense(nn.Conv2d(3, 8, 3, padding=1)),
        nn.BatchNorm2d(8),
        nn.SiLU(inplace=True),
        nn.Dropout2d(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Unflatten(1, (2, 4)),
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        nn.Flatten(),
        dense(nn.Linear(8, 5)),
    )


def test_the_count_is_the_same_in_training_and_evaluation():
    assert math_of(network().train(), torch.ones(1, 3, 8, 8)) == math_of(network().eval(), torch.ones(1, 3, 8, 8))


def test_the_count_is_the_same_without_gradients():
    model = network().eval()
    expected = math_of(model, torch.ones(1, 3, 8, 8))
    assert expected.macs > 0
    with torch.no_grad():
        assert math_of(model, torch.ones(1, 3, 8, 8)) == expected
    assert math_of(model.requires_grad_(False), torch.ones(1, 3, 8, 8)) == expected


def test_the_count_is_the_same_in_inference_mode():
    model = network()
    expected = math_of(model, torch.ones(1, 3, 8, 8))
    with torch.inference_mode():
        assert math_of(model, torch.ones(1, 3, 8, 8)) == expected


def test_the_count_is_the_same_on_the_meta_device():
    expected = math_of(network(), torch.ones(1, 3, 8, 8))
    assert math_of(network().to("meta"), torch.ones(1, 3, 8, 8)) == expected
    assert math_of(network(), torch.ones(1, 3, 8, 8, device="meta")) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_multiplications_and_additions_are_the_same_in_other_precisions(dtype):
    expected, other = (math_of(network().to(t), torch.ones(1, 3, 8, 8, dtype=t)) for t in (torch.float32, dtype))
    assert (other.mults, other.adds, other.macs) == (expected.mults, expected.adds, expected.macs)


def test_transformer_layer_does_not_run_as_one_operation():
    # 5 tokens of width 4: query, key, value and output of 4 x 4, two layers of 4 x 8, attention of 2 x 5 x 5 x 4.
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    assert math_of(layer, torch.ones(1, 5, 4)).macs == 5 * 64 + 5 * 64 + 200


def test_the_model_is_left_unchanged():
    model = network()
    model[0].eval()
    model[3].eval()
    model[9].weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    math_of(model, torch.ones(1, 3, 8, 8))
    assert [m.training for m in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not model[9].weight.requires_grad
    assert model[0].weight.requires_grad
    assert model[0].weight.grad is None


def test_a_buffer_that_the_forward_changes_is_left_unchanged():
    model = module(lambda self, x: x + self.calls.add_(1), calls=torch.zeros(1))
    count(model, (1, 4))
    assert model.calls.item() == 0
    model(torch.ones(1, 4))
    assert model.calls.item() == 1


def test_the_training_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4), module(lambda self, x: torch.special.i0(x)))
    with pytest.raises(NoFormula):
        count(model, (1, 4))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    "constant",
    [
        lambda x: torch.zeros_like(x),
        lambda x: x.new_ones(4),
        lambda x: x.new_full((4,), 2),
        lambda x: torch.zeros(4, dtype=x.dtype),
    ],
    ids=["zeros_like", "new_ones", "new_full", "zeros"],
)
def test_a_constant_made_in_the_forward_has_the_dtype_of_the_model(constant):
    model = module(lambda self, x: x * (constant(x) @ self.w), w=nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)))
    math = math_of(model, torch.ones(4, dtype=torch.bfloat16))
    assert math.mults == 4
