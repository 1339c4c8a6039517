"""Every rule of the score by its id: what it says, which code implements it, and whether a submission exercises it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from micronet_eval.costs import ADDENDS, SCALE_OP
from micronet_eval.dotted import WIDEST
from micronet_eval.evaluation import Report, report_on
from micronet_eval.formats import CODEBOOK_OP, CONVERSIONS
from micronet_eval.masks import ELEMENT
from micronet_eval.opening import Opened
from micronet_eval.scoring import Account
from micronet_eval.storage import FREEBIE_BITS
from micronet_eval.structure import ScaleShift, submodule
from micronet_eval.submission import MANIFEST, build
from micronet_eval.trace import Op, Value


@dataclass(frozen=True)
class Evidence:
    """All that is known of one submission."""

    opened: Opened
    account: Account
    report: Report

    def norms_that_became(self, kind: type[nn.Module]) -> int:
        """The batch norms of the architecture in whose place the submission has such a module."""
        where = self.opened.folder / MANIFEST
        architecture = build(self.opened.manifest.architecture, where, isolation=self.opened.how)
        paths = [path for path, module in architecture.named_modules() if isinstance(module, _BatchNorm)]
        return sum(isinstance(submodule(self.opened.model, path), kind) for path in paths)


Exercised = Callable[[Evidence], bool]


@dataclass(frozen=True)
class Rule:
    """`says` it in one line; `code` names the objects that implement it as module:name.

    `exercised` tells whether it had a part in a score. It is None for what no valid submission can show.
    """

    id: str
    says: str
    code: tuple[str, ...]
    exercised: Exercised | None


def evidence_on(opened: Opened) -> Evidence:
    """Counts a submission; its quality is not measured."""
    return Evidence(opened, opened.account(), report_on(opened))


def _always(evidence: Evidence) -> bool:
    return True


def _runs(*operations: str) -> Exercised:
    """Whether any of these operations was executed, priced or free; ATen's, if they name no other namespace."""
    names = {name if "." in name else f"aten.{name}" for name in operations}
    return lambda e: any(op.name in names for op in e.opened.trace.ops)


def _has_masks(block: bool) -> Exercised:
    """Whether a tensor is stored with a mask of single elements, or of blocks."""

    def exercised(evidence: Evidence) -> bool:
        widest = FREEBIE_BITS if evidence.account.freebie else 64
        masks = [
            s.mask(min(s.format.code_bits, widest), s.format) for s in evidence.account.stored if not s.is_overhead
        ]
        return any(mask is not None and (mask != ELEMENT) == block for mask in masks)

    return exercised


def _has_zero_weights(evidence: Evidence) -> bool:
    return evidence.report.storage.nonzeros < evidence.report.storage.parameters


def _multiplies_below_32_bits(evidence: Evidence) -> bool:
    return any(x.mults and max(x.input_bits, x.weight_bits) < 32 for x in evidence.report.layers)


def _has_bias(op: Op) -> bool:
    return op.name in ADDENDS and op.args[ADDENDS[op.name]] is not None


def _constants(evidence: Evidence) -> list[Value]:
    return [v for op in evidence.opened.trace.ops for v in op.inputs if v.is_constant]


_DOT_PRODUCTS = ("convolution", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot", "addmv", "_grouped_mm")
_TRANSCENDENTAL = ("exp", "log", "sqrt", "rsqrt", "erf", "tanh", "sin", "cos", "pow")
_PERMUTING = ("aten.channel_shuffle", "aten.native_channel_shuffle", "aten.view", "aten.index", "aten.index_select")

RULES: tuple[Rule, ...] = (
    # --- the score ---
    Rule(
        "score.sum",
        "score = storage / baseline + math / baseline",
        ("scoring:score",),
        _always,
    ),
    Rule(
        "score.baseline",
        "each task has its baseline and its threshold",
        ("task:Task",),
        _always,
    ),
    Rule(
        "score.threshold",
        "the quality threshold is hard, in whole examples",
        ("quality:measure",),
        _always,
    ),
    Rule(
        "score.claims",
        "a claim holds up to 1 % (costs), or its last printed digit (quality) (ours)",
        ("evaluation:COST_TOLERANCE", "evaluation:_check"),
        lambda e: bool(e.report.claims),
    ),
    Rule(
        "score.ruleset",
        "a set of rules has a name and a version",
        ("rulesets:RULESETS",),
        _always,
    ),
    Rule(
        "score.test-data",
        "training and calibration never see the test set",
        ("submission:Provenance",),
        _always,
    ),
    # --- storage ---
    Rule(
        "storage.bits",
        "a value of b bits counts b / 32",
        ("storage:Stored.bits", "scoring:account"),
        _always,
    ),
    Rule(
        "storage.everything",
        "all that inference needs is stored, each tensor once",
        ("storage:stored_tensors", "storage:_sources"),
        _always,
    ),
    Rule(
        "storage.bitmask",
        "a sparse tensor is its non-zero values and a mask of 1 bit an element",
        ("storage:Stored.mask",),
        _has_masks(block=False),
    ),
    Rule(
        "storage.block-mask",
        "a block-sparse tensor has 1 bit a block",
        ("masks:candidates", "masks:block_mask"),
        _has_masks(block=True),
    ),
    Rule(
        "storage.smallest",
        "the smallest of dense, mask and block mask counts, for each tensor",
        ("storage:Stored.mask",),
        _has_zero_weights,
    ),
    Rule(
        "storage.overhead",
        "exponents, scales, zero points and codebooks are stored",
        ("formats.number:FixedPoint", "formats.number:Affine", "formats.number:Codebook", "storage:_side"),
        lambda e: e.report.storage.overhead_bits > 0,
    ),
    Rule(
        "storage.code",
        "what the code makes (numbers, tables, random weights) is stored (ours)",
        ("storage:_numbers", "storage:_costs_nothing"),
        lambda e: e.report.storage.code_bits > 0,
    ),
    Rule(
        "storage.permutation",
        "a permutation is stored",
        ("storage:_permutation", "costs.moves:permutation_of"),
        lambda e: any(s.name.startswith("permutation of") for s in e.account.stored),
    ),
    Rule(
        "storage.merged",
        "batch norm that merges exactly is merged before counting",
        ("merge:merged",),
        lambda e: e.norms_that_became(nn.Identity) > 0,
    ),
    Rule(
        "storage.batch-norm",
        "a batch norm that cannot be merged stores 2 values a channel",
        ("merge:without_batch_norm", "storage:_constants"),
        lambda e: e.norms_that_became(ScaleShift) > 0,
    ),
    Rule(
        "storage.freebie",
        "a model without quantization below 16 bits counts as 16 bit",
        ("storage:freebie_applies", "scoring:weighted"),
        lambda e: e.report.freebie,
    ),
    # --- math: bit-widths ---
    Rule(
        "width.widest",
        "an operation counts its widest input / 32, never more than 1",
        ("scoring:weighted", "precision:factor_widths"),
        _multiplies_below_32_bits,
    ),
    Rule(
        "width.graph",
        "quantizers narrow a value, moves keep its width, arithmetic widens it",
        ("precision:bit_widths", "grids:keeps_width", "costs:SELECTS"),
        _multiplies_below_32_bits,
    ),
    Rule(
        "width.bias",
        "a bias does not widen a dot product",
        ("costs.dot_products:ADDENDS",),
        lambda e: any(map(_has_bias, e.opened.trace.ops)),
    ),
    Rule(
        "width.accumulate",
        "additions that accumulate count 1",
        ("costs.cost:Cost", "scoring:weighted"),
        _runs(*_DOT_PRODUCTS, "mean", "sum"),
    ),
    Rule(
        "width.accumulator",
        "additions in accumulators that really wrap at few bits count those",
        ("dotted:accumulators", "formats:accumulator", "scoring:account"),
        lambda e: any(x.accumulator_bits < WIDEST for x in e.report.layers),
    ),
    Rule(
        "width.signs",
        "a product with -1 or +1 of a value with a sign bit counts 1/32",
        ("precision:_flips_signs", "precision:has_sign_bit", "grids:has_only_signs"),
        lambda e: any(x.input_bits == x.weight_bits == 1 for x in e.report.layers),
    ),
    Rule(
        "width.conversions",
        "conversions to formats that a float represents exactly are free",
        ("formats.conversions:CONVERSIONS", "grids:grid_of"),
        _runs(*CONVERSIONS),
    ),
    Rule(
        "width.scales",
        "a scale that is no power of two is a multiplication an output",
        ("precision:with_scales", "costs.scales:scale"),
        lambda e: any(x.op == SCALE_OP for x in e.report.layers),
    ),
    Rule(
        "width.codebook",
        "a codebook's weights are multiplied at the width of its table",
        ("grids:grid_of",),
        lambda e: any(v.producer is not None and v.producer.name == CODEBOOK_OP for v in _constants(e)),
    ),
    Rule(
        "width.declared",
        "what is declared quantized but multiplied at 32 bit is told",
        ("evaluation:_wide",),
        lambda e: bool(e.report.warnings),
    ),
    # --- math: what is counted ---
    Rule(
        "math.dot-product",
        "n non-zero weights behind an output: n mults, n - 1 adds, 1 more for a bias",
        ("costs.dot_products:dot_products", "costs.dot_products:convolution", "costs.dot_products:mm"),
        _runs(*_DOT_PRODUCTS),
    ),
    Rule(
        "math.zero-weights",
        "zero weights are not counted, and an output without weights costs nothing",
        ("costs.dot_products:nonzeros_by_output", "costs.dot_products:nonzeros_by_matrix"),
        _has_zero_weights,
    ),
    Rule(
        "math.activations",
        "zeros among activations, and zero padding, count like any value",
        ("costs.dot_products:convolution",),
        _runs(*_DOT_PRODUCTS),
    ),
    Rule(
        "math.transposed",
        "a transposed convolution multiplies each input by each weight of its channel (ours)",
        ("costs.dot_products:transposed_convolution",),
        lambda e: any(op.name == "aten.convolution" and op.args[6] for op in e.opened.trace.ops),
    ),
    Rule(
        "math.attention",
        "attention counts as its products and its softmax, fused or not",
        ("unfused:unfused", "costs.dot_products:attention"),
        lambda e: any(op.name == "aten.bmm" and not any(v.is_constant for v in op.inputs) for op in e.opened.trace.ops),
    ),
    Rule(
        "math.recurrent",
        "recurrent layers count as the products and activations of every step",
        ("unfused:unfused",),
        lambda e: any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in e.opened.model.modules()),
    ),
    Rule(
        "math.paths",
        "a conditional model counts the mean over the examples",
        ("conditional:Conditional", "paths:mean_account"),
        lambda e: bool(e.report.paths),
    ),
    Rule(
        "math.token",
        "a language model counts per token, the mean over positions and clusters",
        ("language:step", "language:mean_position", "language:per_token", "language:shares_of_clusters"),
        lambda e: e.opened.steps is not None,
    ),
    Rule(
        "math.parameters",
        "operations on parameters alone run when the model is loaded",
        ("trace:_Recorder._fold",),
        lambda e: e.opened.trace.folded > 0,
    ),
    Rule(
        "math.unknown",
        "an operation without a formula is an error",
        ("costs:cost_of", "costs.cost:NoFormula"),
        None,
    ),
    Rule(
        "math.one-mode",
        "the count is that of evaluation, whatever device, dtype and mode",
        ("trace:trace",),
        _always,
    ),
    # --- math: operations, mults + adds an element ---
    Rule(
        "op.relu",
        "ReLU, leaky and parametric ReLU: 1 + 0",
        ("costs.elementwise:FORMULAS",),
        _runs("relu", "leaky_relu", "_prelu_kernel", "rrelu_with_noise"),
    ),
    Rule(
        "op.relu6",
        "ReLU6, hardtanh: 2 + 0; a clamp 1 for each bound (ours)",
        ("costs.elementwise:FORMULAS", "costs.elementwise:clamp"),
        _runs("hardtanh", "clamp"),
    ),
    Rule("op.sigmoid", "sigmoid: 2 + 1", ("costs.elementwise:FORMULAS",), _runs("sigmoid")),
    Rule("op.silu", "swish (SiLU): 3 + 1", ("costs.elementwise:FORMULAS",), _runs("silu")),
    Rule(
        "op.hard",
        "hard sigmoid 2 + 1, hard swish 3 + 1 (ours)",
        ("costs.elementwise:FORMULAS",),
        _runs("hardsigmoid", "hardswish"),
    ),
    Rule(
        "op.transcendental",
        "tanh, exp, log, sqrt, erf and their like: 1 + 0",
        ("costs.elementwise:_TRANSCENDENTAL",),
        _runs(*_TRANSCENDENTAL),
    ),
    Rule("op.gelu", "GELU: 4 + 1 (ours)", ("costs.elementwise:FORMULAS",), _runs("gelu")),
    Rule(
        "op.multiply",
        "element-wise product, quotient: 1 + 0; bitwise operations too",
        ("costs.elementwise:elementwise", "costs.elementwise:_BITWISE"),
        _runs("mul", "div", "bitwise_and", "bitwise_or", "bitwise_xor"),
    ),
    Rule(
        "op.add",
        "element-wise sum, difference, residual: 0 + 1",
        ("costs.elementwise:add",),
        _runs("add", "sub", "rsub"),
    ),
    Rule(
        "op.mean",
        "average pooling, mean of k: 1 + k - 1",
        ("costs.reductions:mean", "costs.resampling:avg_pool", "costs.resampling:adaptive_avg_pool"),
        _runs("mean", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    ),
    Rule(
        "op.maximum",
        "max pooling, maximum of k: 0 + k - 1 (ours)",
        ("costs.reductions:largest", "costs.resampling:max_pool"),
        _runs("amax", "max", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d"),
    ),
    Rule(
        "op.softmax",
        "softmax of k: 2 k + k - 1 (ours)",
        ("costs.reductions:softmax", "costs.reductions:log_softmax"),
        _runs("_softmax", "_safe_softmax", "_log_softmax"),
    ),
    Rule(
        "op.norm",
        "layer norm and its kin as executed (ours); a batch norm 1 + 1",
        ("costs.norms:normalization", "costs.norms:batch_norm", "costs.norms:rms_norm"),
        _runs("native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm"),
    ),
    Rule(
        "op.interpolation",
        "interpolation by t taps: t + t - 1 (ours); nearest free",
        ("costs.resampling:interpolation",),
        _runs("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_nearest2d"),
    ),
    Rule(
        "op.permutation",
        "a permutation, a channel shuffle: 1 + 0",
        ("costs.moves:permutation", "costs.moves:permutes"),
        lambda e: any(x.op in _PERMUTING for x in e.report.layers),
    ),
    Rule(
        "op.free",
        "views, moves, padding, look-ups cost nothing, each with its reason",
        ("costs.moves:FREE",),
        lambda e: bool(e.report.coverage.free),
    ),
    # --- beside the score ---
    Rule(
        "beside.accumulators",
        "what other accumulators would score, exact ones proved for each channel (ours)",
        ("accumulators:what_if", "accumulators:exact_widths"),
        lambda e: e.report.what_if.exact_accumulators.additions > 0,
    ),
    Rule(
        "beside.activation",
        "the most bits of activations that are alive at once (ours)",
        ("activation:activation_peak",),
        _always,
    ),
)
