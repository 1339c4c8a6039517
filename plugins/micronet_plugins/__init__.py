"""The bundled strategies, tasks and architectures, registered as any stranger's plugin registers its own.

Modules are imported when something asks for what they register, so that loading this plugin costs nothing.
"""

from __future__ import annotations

from typing import Any

from micronet_eval.hookspecs import hookimpl


@hookimpl
def micronet_register_pruners(register: Any) -> None:
    """The bundled pruners."""
    from micronet_plugins import channels
    from micronet_plugins.eigendamage import EigenDamage
    from micronet_plugins.low_rank import LowRank
    from micronet_plugins.torch_pruning_adapter import TorchPruning

    register("low-rank", LowRank)
    register("eigendamage", EigenDamage)
    register("magnitude", channels.ChannelMagnitude)
    register("taylor", channels.Taylor)
    register("bn-scale", channels.BNScale)
    register("fpgm", channels.FPGM)
    register("hrank", channels.HRank)
    register("random", channels.RandomChannels)
    register("torch-pruning", TorchPruning)


@hookimpl
def micronet_register_sparsifiers(register: Any) -> None:
    """The bundled sparsifiers."""
    from micronet_plugins import patterns, scheduled, second_order
    from micronet_plugins.magnitude import Magnitude

    register("magnitude", Magnitude)
    register("random", patterns.Random)
    register("n-m", patterns.NofM)
    register("block", patterns.Block)
    register("wanda", second_order.Wanda)
    register("obs", second_order.OBS)
    register("gradual", scheduled.Gradual)
    register("movement", scheduled.Movement)


@hookimpl
def micronet_register_quantizers(register: Any) -> None:
    """The bundled quantizers."""
    from micronet_plugins.accumulators import Accumulators
    from micronet_plugins.affine import AffineStrategy
    from micronet_plugins.biases import Biases
    from micronet_plugins.brevitas_adapter import Brevitas
    from micronet_plugins.codebook import CodebookStrategy
    from micronet_plugins.fixed_point import FixedPointStrategy
    from micronet_plugins.gptq import GPTQ
    from micronet_plugins.low_bits import Binary, Ternary
    from micronet_plugins.lsq import LSQ
    from micronet_plugins.mixed import Mixed
    from micronet_plugins.torchao_adapters import TorchAO

    register("fixed-point", FixedPointStrategy)
    register("affine", AffineStrategy)
    register("lsq", LSQ)
    register("binary", Binary)
    register("ternary", Ternary)
    register("codebook", CodebookStrategy)
    register("gptq", GPTQ)
    register("mixed", Mixed)
    register("torchao", TorchAO)
    register("brevitas", Brevitas)
    register("biases", Biases)
    register("accumulators", Accumulators)


@hookimpl
def micronet_register_executors(register: Any) -> None:
    """The bundled executors."""
    from micronet_plugins import executors, ray_executor

    register("here", executors.here)
    register("local", executors.local)
    register("ray", ray_executor.on_ray)


@hookimpl
def micronet_register_tasks(register: Any) -> None:
    """The bundled tasks."""
    from micronet_plugins.language import WIKITEXT103
    from micronet_plugins.tasks import TASKS

    for task in (*TASKS, WIKITEXT103):
        register(task.name, task)


@hookimpl
def micronet_register_architectures(register: Any) -> None:
    """The bundled architectures."""
    from micronet_plugins import architectures, language, osi_ai

    register("pyramidnet", architectures.pyramidnet)
    register("wide-resnet", architectures.wide_resnet)
    register("resnet", architectures.resnet)
    register("mobilenet-v2", architectures.mobilenet_v2)
    register("osi-ai", osi_ai.osi_ai)
    register("torchvision", architectures.torchvision_model)
    register("lstm-lm", language.lstm_lm)
    register("transformer-lm", language.transformer_lm)
