"""Models of torchvision, timm and transformers are counted; benchmarks/coverage.py has all of the first two."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from benchmarks import coverage
from micronet_eval import plugins, score
from micronet_eval.errors import InputError
from micronet_eval.scoring import account
from micronet_eval.targets import build, torchvision_model
from micronet_eval.trace import trace

RESULTS = json.loads((Path(__file__).parent.parent / "benchmarks/results/coverage.json").read_text())

TORCHVISION = [
    "alexnet", "convnext_tiny", "deeplabv3_mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "lraspp_mobilenet_v3_large", "maxvit_t", "mnasnet0_5", "mobilenet_v3_small", "mvit_v2_s", "r3d_18", "raft_small",
    "regnet_x_400mf", "resnext50_32x4d", "retinanet_resnet50_fpn", "s3d", "shufflenet_v2_x0_5", "squeezenet1_1",
    "ssdlite320_mobilenet_v3_large", "swin3d_t", "swin_v2_t", "vgg11_bn", "quantized_mobilenet_v2",
]  # fmt: skip
TIMM = [
    "beit_base_patch16_224", "coat_lite_tiny", "convit_tiny", "crossvit_tiny_240", "csatv2", "davit_tiny", "dpn68",
    "edgenext_xx_small", "efficientformerv2_s0", "eva02_tiny_patch14_224", "fastvit_t8", "gcvit_xxtiny", "ghostnet_050",
    "hrnet_w18_small", "levit_128s", "mambaout_femto", "mixer_s16_224", "mobilenetv4_conv_small", "mobilevitv2_050",
    "mvitv2_tiny", "nfnet_f0", "pit_ti_224", "poolformer_s12", "repvit_m0_9",
    "tnt_s_legacy_patch16_224", "volo_d1_224", "xcit_nano_12_p16_224",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("library", "name"), [("torchvision", n) for n in TORCHVISION] + [("timm", n) for n in TIMM])
def test_a_model_of_the_zoo_counts(library, name):
    """A sample of families, with the MACs that the last run over all models wrote down."""
    pytest.importorskip(library)
    assert coverage.count(library, name) == RESULTS[library][name]["macs"]


def test_all_of_torchvision_and_nearly_all_of_timm_count():
    counted = {name: [("macs" in model) for model in RESULTS[name].values()] for name in ("torchvision", "timm")}
    assert set(RESULTS["torchvision"]) == set(models.list_models())
    assert all(counted["torchvision"])
    assert len(counted["timm"]) > 1_000
    assert sum(counted["timm"]) >= 0.98 * len(counted["timm"])
    assert all(model.get("macs", 1) > 0 for name in counted for model in RESULTS[name].values())


def test_the_page_of_the_documentation_is_that_of_the_results():
    assert coverage.PAGE.read_text() == coverage.page(RESULTS)


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "convnext_base", "densenet121", "inception_v3", "swin_t", "vit_b_32"]
)
def test_macs_agree_with_torchvisions_own_table(name):
    """Its metadata has the multiply-accumulates in billions, to three digits."""
    size = 299 if name == "inception_v3" else 224
    report = score(torchvision_model(name), torch.zeros(1, 3, size, size), task="imagenet")
    assert round(report.math.macs / 1e9, 3) == models.get_model_weights(name).DEFAULT.meta["_ops"]
    assert sum(layer.mults for layer in report.layers) == report.math.mults
    assert sum(layer.macs for layer in report.layers) == report.math.macs
    stored = sum(layer.storage_bits for layer in (*report.layers, *report.free_layers))
    assert stored == report.storage.bits


def test_an_input_of_the_wrong_size_is_an_input_error():
    with pytest.raises(InputError, match="1x3x200x200"):
        trace(torchvision_model("vit_b_32"), torch.zeros(1, 3, 200, 200))


def test_a_whole_detector_is_an_error_that_says_why():
    with pytest.raises(InputError, match="depends on values"):
        trace(torchvision_model("fasterrcnn_resnet50_fpn"), torch.zeros(1, 3, 224, 224))


# --- transformers: small random models of common kinds ----------------------------------------------------------------

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**WIDTH, "vocab_size": 100, "max_position_embeddings": 64}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {**WIDTH, "image_size": 32, "patch_size": 8}
GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
SEQUENCES = {"vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip

TOKENS, PIXELS = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 3, 32, 32)
BOTH = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}

TRANSFORMERS = {
    "BertModel": (TEXT, TOKENS),
    "RobertaModel": (TEXT, TOKENS),
    "DistilBertModel": ({"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, TOKENS),
    "AlbertModel": ({**TEXT, "embedding_size": 16}, TOKENS),
    "ElectraModel": (TEXT, TOKENS),
    "GPT2LMHeadModel": (GPT, TOKENS),
    "GPTJForCausalLM": ({**GPT, "rotary_dim": 8}, TOKENS),
    "GPTNeoXForCausalLM": (TEXT, TOKENS),
    "OPTForCausalLM": ({"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "ffn_dim": 64, "word_embed_proj_dim": 32}, TOKENS),
    "LlamaForCausalLM": (GROUPED, TOKENS),
    "MistralForCausalLM": (GROUPED, TOKENS),
    "Qwen2ForCausalLM": (GROUPED, TOKENS),
    "Gemma2ForCausalLM": (GROUPED, TOKENS),
    "PhiForCausalLM": (TEXT, TOKENS),
    "BloomForCausalLM": ({"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}, TOKENS),
    "FalconForCausalLM": ({"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
                          TOKENS),
    "T5ForConditionalGeneration": ({"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
                                    "num_heads": 4, "decoder_start_token_id": 0}, BOTH),
    "BartModel": (SEQUENCES, BOTH),
    "WhisperModel": ({**SEQUENCES, "max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 16},
                     {"input_features": torch.zeros(1, 16, 64), "decoder_input_ids": TOKENS}),
    "ViTModel": (IMAGE, PIXELS),
    "DeiTModel": (IMAGE, PIXELS),
    "Dinov2Model": ({k: v for k, v in IMAGE.items() if k != "intermediate_size"}, PIXELS),
    "SwinModel": ({"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
                   "window_size": 4}, PIXELS),
    "CLIPModel": ({"text_config": {**TEXT, "bos_token_id": 0, "eos_token_id": 2}, "vision_config": IMAGE,
                   "projection_dim": 16}, {"input_ids": TOKENS, "pixel_values": PIXELS}),
    "ConvNextModel": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, PIXELS),
    "ResNetModel": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, PIXELS),
}  # fmt: skip
"""Class -> its configuration, and an input."""


def transformer(name, options):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(kind.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model


def macs(model, example):
    return account(trace(model, example), plugins.formulas()).math.macs


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_counts_as_torchs_flop_counter_does(name):
    """Which sees only attention that is written out; here it runs fused."""
    options, example = TRANSFORMERS[name]
    model = transformer(name, options)
    counted = macs(model, example)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**example) if isinstance(example, dict) else model(example)
    assert 2 * counted == counter.get_total_flops()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_mixture_of_experts_counts_the_experts_that_run():
    model = transformer("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2})
    # 8 tokens: query and output 32 x 32, key and value 32 x 16, 4 heads of 8 x 8 x 8 twice, the choice of 4 experts,
    # and two experts of three matrices 32 x 64; two layers. At the end 100 words.
    layer = 8 * (2 * 32 * 32 + 2 * 32 * 16) + 2 * 4 * 8 * 8 * 8 + 8 * 32 * 4 + 8 * 2 * 3 * 32 * 64
    assert macs(model, TOKENS) == 2 * layer + 8 * 32 * 100


class Structured(nn.Module):
    """Returns its result in a dataclass, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        from dataclasses import make_dataclass

        return {"all": [make_dataclass("Output", ["logits"])(self.layer(x))]}


def test_results_in_dicts_and_dataclasses_are_found():
    assert [value.shape for value in trace(Structured(), torch.zeros(1, 4)).outputs] == [(1, 2)]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 200])
def test_a_table_by_depth(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, _ = run("count", "torchvision:resnet18", "--input", "1x3x224x224", "--depth", "1")
    assert status == 0
    assert max(map(len, out.splitlines())) <= width
    names = [line.split()[0] for line in out.splitlines() if line.startswith(" ") and line.split()]
    assert names[-9:] == ["conv1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    assert "100.0%" in out


def test_a_table_by_depth_adds_up(run):
    arguments = ("count", "torchvision:resnet18", "--input", "1x3x224x224", "--depth", "2", "--format", "json")
    report = json.loads(run(*arguments)[1])
    rows = {row["module"]: row for row in report["breakdown"]}
    for figure in ("mults", "adds", "macs", "ops32", "storage_bits"):
        top = sum(row[figure] for row in report["breakdown"] if row["depth"] == 1)
        assert top == rows["total"][figure]
        assert rows["layer1"][figure] == rows["layer1.0"][figure] + rows["layer1.1"][figure]
    assert rows["total"]["macs"] == report["math"]["macs"] == 1_814_073_344  # torchvision says 1.814 G
    assert rows["total"]["storage_bits"] == report["storage"]["bits"]
    assert rows["fc"]["macs"] == 512_000
    # Four 3x3 convolutions, 64 to 64 channels, on 56 x 56.
    assert rows["layer1"]["macs"] == 4 * 64 * 64 * 9 * 56 * 56
    assert [row["module"] for row in report["breakdown"][3:8]] == [
        "maxpool",
        "layer1",
        "layer1.0",
        "layer1.1",
        "layer2",
    ]


def test_the_table_of_a_look_up_is_in_the_row_of_its_module(tmp_path, monkeypatch, run):
    (tmp_path / "words.py").write_text(
        "from torch import nn\ndef model(): return nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    out = run("count", "words:model", "--input", "1x5:int64", "--depth", "1", "--format", "json")[1]
    rows = {row["module"]: row for row in json.loads(out)["breakdown"]}
    assert (rows["0"]["storage_bits"], rows["1"]["storage_bits"]) == (800 * 16, 18 * 16)
    assert rows["1"]["macs"] == 5 * 16


def test_inputs_by_name_and_type(tmp_path, monkeypatch, run):
    (tmp_path / "named.py").write_text(
        "from torch import nn\n"
        "class Model(nn.Module):\n"
        "    def forward(self, a, b=None): return a if b is None else a * b\n"
        "def model(): return Model()\n"
    )
    monkeypatch.chdir(tmp_path)

    def mults(*inputs):
        words = [word for text in inputs for word in ("--input", text)]
        status, out, err = run("count", "named:model", *words, "--format", "json")
        return json.loads(out)["math"]["mults"] if status == 0 else (status, err)

    assert mults("b=1x3", "a=1x3") == 3
    assert mults("1x3", "1x3") == 3
    assert mults("1x3") == 0
    assert mults("1x3:bfloat16", "1x1:float32") == 3
    for inputs in (("a=1x3", "1x3"), ("1x3", "b=1x3"), ("a=1x3", "a=1x3"), ("1x3:words",), ("axb",), ("=1x3",)):
        status, message = mults(*inputs)
        assert (status, message.count("--input")) == (2, 1)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("timm:resnet_18", "unknown timm model 'resnet_18'; nearest: resnet18"),
        ("transformers:Bert", "transformers has no model class 'Bert'; write for example transformers:BertModel"),
        ("torchvision:resnet_18", "unknown torchvision model 'resnet_18'; nearest: resnet18"),
    ],
)
def test_targets_that_are_not_there(target, message):
    pytest.importorskip(target.partition(":")[0])
    with pytest.raises(InputError, match=message):
        build(target)


def test_a_library_that_is_not_installed_is_one_clear_message(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(InputError, match="timm is not installed; pip install timm"):
        build("timm:resnet18")
