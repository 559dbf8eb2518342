"""The rules between the settings of a run; `validate` checks all of them.

Every rule raises a `ConfigError` that names the key and its value, the rule, and the mend. A setting that the chosen
policy, read form or schedule would ignore must keep its default: a value given on purpose and then not used is an
error, because a sweep over it would compare a run with itself.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from dla_train.config import CHOICES, TAU_RANGE, CheckpointConfig, Config, ConfigError, MemoryConfig, ModelConfig
from dla_train.data_config import check_data, longest_chunk
from dla_train.evaluation_rules import check_evaluation
from dla_train.layout_rules import (
    context_problems,
    divisors,
    listed,
    ranks_along_time,
    refuse,
    rows_problem,
    sequence_problem,
    tensor_problems,
    time_problem,
)

MAX_CAPACITY = 64
"""Most slots a head may keep: the bookkeeping of a chunk is a table of capacity entries per token."""
CHUNKS = (16, 32, 64, 128, 256)
"""Legal chunk lengths in tokens."""


def validate(config: Config, world_size: int = 1) -> None:
    """Check every rule of a run on `world_size` ranks; raises ConfigError at the first one broken. Takes no torch."""
    _check_choices(config)
    _check_numbers(config)
    _check_model(config.model)
    _check_layout(config)
    _check_memory(config.model, config.memory)
    _check_ignored_memory_keys(config.memory)
    _check_context(config)
    _check_schedule(config)
    _check_batch(config, world_size)
    check_engine(config)
    _check_loop(config)
    check_evaluation(config.evaluation, longest_context(config.memory))
    _check_checkpoints(config.checkpoint)
    check_data(config)


def value_at(config: Config, key: str) -> Any:
    """The value at a dotted key such as `model.width`."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _reject(key: str, value: Any, rule: str, mend: str) -> None:
    raise ConfigError(f"{key}={value} {rule}; {mend}")


def _check_choices(config: Config) -> None:
    for key, choices in CHOICES.items():
        value = value_at(config, key)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}? " if near else ""
            _reject(key, value, "is not one of the choices", f"{meant}choose from {', '.join(choices)}")


AT_LEAST: dict[str, int] = {
    "seed": 0,
    "model.vocab_size": 2,
    "model.width": 1,
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.num_key_heads": 1,
    "model.key_dim": 1,
    "model.value_dim": 1,
    "model.mlp_width": 0,
    "model.conv_width": 0,
    "model.qk_norm_eps": 0,
    "memory.interval_tokens": 1,
    "memory.levels": 1,
    "memory.routing_dim": 1,
    "data.context_tokens": 1,
    "data.loader_workers": 0,
    "optim.warmup_steps": 0,
    "optim.decay_steps": 0,
    "train.steps": 1,
    "train.global_batch_rows": 1,
    "train.micro_batch_rows": 1,
    "train.segment_tokens": 0,
    "train.validation_interval_steps": 0,
    "train.validation_batches": 0,
    "evaluation.interval_steps": 0,
    "evaluation.limit": 0,
    "evaluation.num_fewshot": 0,
    "evaluation.batch_tokens": 1,
    "evaluation.decode_rows": 1,
    "parallel.tensor": 1,
    "parallel.context": 1,
    "engine.zero_stage": 0,
    "checkpoint.interval_steps": 0,
    "checkpoint.keep_last": 0,
    "checkpoint.keep_every_steps": 0,
    "logging.interval_steps": 1,
    "logging.memory_interval_steps": 0,
    "resilience.max_skipped_steps": 0,
    "resilience.spike_deviations": 0,
    "resilience.spike_window_steps": 1,
    "resilience.spike_patience_steps": 1,
    "resilience.max_rewinds": 0,
    "resilience.setup_minutes": 0,
    "resilience.first_step_minutes": 0,
    "resilience.step_minutes": 0,
    "resilience.validation_minutes": 0,
    "resilience.evaluation_minutes": 0,
    "resilience.checkpoint_minutes": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "optim.z_loss": 0,
    "memory.gain_init": 0,
    "logging.peak_tflops": 0,
}
"""Smallest legal value of counts and weights."""

POSITIVE = (
    "model.rope_base",
    "model.norm_eps",
    "model.init_std",
    "memory.tau_step",
    "memory.sharpness_init",
    "memory.gate_temperature",
    "memory.gate_temperature_final",
    "optim.lr",
    "optim.eps",
    "parallel.timeout_minutes",
    "logging.wandb_init_timeout_seconds",
)
"""Real numbers that must be above 0."""

SHARES = {
    "memory.target_boundary_rate": (False, False),
    "optim.beta1": (True, False),
    "optim.beta2": (True, False),
    "optim.final_lr_ratio": (True, True),
}
"""Keys between 0 and 1: whether 0 and 1 themselves are legal."""


def _check_numbers(config: Config) -> None:
    for key, least in AT_LEAST.items():
        value = value_at(config, key)
        if not value >= least:
            _reject(key, value, f"is below {least}", f"use {least} or more")
    for key in POSITIVE:
        value = value_at(config, key)
        if not value > 0:
            _reject(key, value, "is not above 0", "use a positive number")
    for key, (zero, one) in SHARES.items():
        value = value_at(config, key)
        if not ((0 < value < 1) or (zero and value == 0) or (one and value == 1)):
            interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
            _reject(key, value, f"lies outside {interval}", f"use a number in {interval}")


def _check_model(model: ModelConfig) -> None:
    if model.num_heads % model.num_key_heads:
        _reject(
            "model.num_key_heads",
            model.num_key_heads,
            f"does not divide model.num_heads={model.num_heads}",
            f"choose from {listed(divisors(model.num_heads))}",
        )
    if model.conv_bias and not model.conv_width:
        rule = "has no convolution to go with where model.conv_width=0"
        _reject("model.conv_bias", True, rule, "set model.conv_width=4, or model.conv_bias=false")
    if model.qk_norm_eps and model.backbone != "gated_deltanet":
        rule = f"is used only with model.backbone=gated_deltanet, not {model.backbone}"
        _reject("model.qk_norm_eps", model.qk_norm_eps, rule, "leave it at 0")
    if model.backbone != "attention":
        return
    if model.value_dim != model.key_dim:
        rule = f"differs from model.key_dim={model.key_dim}, and attention has one head size"
        _reject("model.value_dim", model.value_dim, rule, f"set model.value_dim={model.key_dim}")
    if model.key_dim % 2:
        rule = "is odd, and the rotary embedding turns pairs of features"
        _reject("model.key_dim", model.key_dim, rule, "choose an even head size")
    if model.conv_width:
        rule = "is set, and attention has no short convolution"
        _reject("model.conv_width", model.conv_width, rule, "set model.conv_width=0")


def _check_layout(config: Config) -> None:
    """Inside mixers a context rank has whole rows of some heads, outside them some tokens of whole rows."""
    model, parallel, context_tokens = config.model, config.parallel, config.data.context_tokens
    refuse(tensor_problems(model, parallel.tensor).values())
    refuse(context_problems(model, parallel.tensor, parallel.context).values())
    refuse([time_problem(f"data.context_tokens={context_tokens}", context_tokens, ranks_along_time(parallel))])
    refuse([sequence_problem(parallel.sequence, parallel.tensor)])


def _check_memory(model: ModelConfig, memory: MemoryConfig) -> None:
    if (model.backbone == "attention") != (memory.policy == "none"):
        if model.backbone == "attention":
            mend = "use memory=none, or a recurrent backbone"
            _reject("memory.policy", memory.policy, "does not go with model.backbone=attention", mend)
        mend = "use memory=single, or model.backbone=attention"
        _reject("memory.policy", "none", f"leaves model.backbone={model.backbone} without a memory", mend)
    if not 1 <= memory.capacity <= MAX_CAPACITY:
        rule = f"lies outside 1 to {MAX_CAPACITY}"
        _reject("memory.capacity", memory.capacity, rule, f"choose from 1 to {MAX_CAPACITY} slots")
    if not TAU_RANGE[0] <= memory.tau <= TAU_RANGE[1]:
        rule = f"lies outside {TAU_RANGE[0]} to {TAU_RANGE[1]}"
        _reject("memory.tau", memory.tau, rule, "the paper's range is 0.5 to 0.7")
    if memory.policy == "single":
        if memory.capacity != 1:
            _reject("memory.capacity", memory.capacity, "contradicts memory.policy=single", "set memory.capacity=1")
        if memory.read != "unit":
            rule = "contradicts memory.policy=single, whose one state is read with weight 1"
            _reject("memory.read", memory.read, rule, "set memory.read=unit")
    if memory.policy == "dla" and memory.read == "unit" and memory.gate != "hard":
        rule = "has no effect with memory.read=unit, which reads every slot alike"
        _reject("memory.gate", memory.gate, rule, "set memory.gate=hard, or memory.read=slot or content")
    if memory.tau_control == "learned" and memory.policy == "dla" and memory.gate == "hard":
        rule = "gets no gradient through memory.gate=hard"
        _reject("memory.tau_control", "learned", rule, "set memory.gate=soft, or memory.tau_control=rate")
    if memory.chunk_tokens and memory.chunk_tokens not in CHUNKS:
        rule = "is not a legal chunk"
        _reject("memory.chunk_tokens", memory.chunk_tokens, rule, f"choose 0 (automatic) or {listed(CHUNKS)}")


def _check_ignored_memory_keys(memory: MemoryConfig) -> None:
    dla, reads, levels = memory.policy == "dla", memory.read != "unit", memory.policy == "log_linear"
    content = memory.routes and memory.policy not in ("single", "none")
    gated = dla and reads and memory.gate != "hard"
    conditions: list[tuple[bool, str, tuple[str, ...]]] = [
        (dla, "memory.policy=dla", ("tau", "tau_control", "drift", "capacity_rule")),
        (dla and memory.tau_control == "rate", "memory.tau_control=rate", ("target_boundary_rate", "tau_step")),
        (memory.policy == "fixed", "memory.policy=fixed", ("interval_tokens",)),
        (levels and memory.weighs_slots, "memory.policy=log_linear with a weight per level", ("levels",)),
        (memory.policy not in ("single", "none"), "a policy with several slots", ("closed_slots",)),
        (content, "memory.read=content or content_only", ("routing", "gain_init", "sharpness_init")),
        (content and memory.routing != "qk", "a memory.routing with projections of its own", ("routing_dim",)),
        (gated, "memory.policy=dla with a soft gate", ("gate_temperature", "gate_temperature_final")),
        (memory.policy != "none", "a recurrent memory", ("chunk_tokens", "backend")),
    ]
    defaults = {item.name: item.default for item in dataclasses.fields(MemoryConfig)}
    for used, condition, keys in conditions:
        for key in keys:
            value = getattr(memory, key)
            if not used and value != defaults[key]:
                _reject(f"memory.{key}", value, f"is used only with {condition}", f"leave it at {defaults[key]}")
    if not dla and memory.gate not in ("soft", "hard"):
        _reject("memory.gate", memory.gate, "is used only with memory.policy=dla", "leave it at soft")


def _check_context(config: Config) -> None:
    context, memory = config.data.context_tokens, config.memory
    if memory.chunk_tokens > longest_chunk(context):
        rule = f"is longer than data.context_tokens={context}"
        _reject("memory.chunk_tokens", memory.chunk_tokens, rule, "choose 0 (automatic) or a shorter chunk")
    longest = longest_context(memory)
    if longest is not None and context > longest:
        rule = f"bounds log_linear at {longest} tokens, below data.context_tokens={context}"
        mend = f"set memory.capacity={(context - 1).bit_length() + 1} or more"
        _reject("memory.capacity", memory.capacity, rule, mend)


def longest_context(memory: MemoryConfig) -> int | None:
    """Most tokens of a document that the memory can read: a Fenwick tree has a level a slot. None is no limit."""
    return 2 ** (memory.capacity - 1) if memory.policy == "log_linear" else None


def _check_schedule(config: Config) -> None:
    optim, steps = config.optim, config.train.steps
    if optim.warmup_steps > steps:
        rule = f"is longer than train.steps={steps}"
        _reject("optim.warmup_steps", optim.warmup_steps, rule, "warm up in fewer steps")
    if optim.schedule == "wsd":
        if not optim.decay_steps:
            rule = "leaves optim.schedule=wsd without its decay"
            _reject("optim.decay_steps", 0, rule, "set it to a tenth of train.steps, or optim.schedule=constant")
        if optim.warmup_steps + optim.decay_steps > steps:
            rule = f"and optim.warmup_steps={optim.warmup_steps} together exceed train.steps={steps}"
            _reject("optim.decay_steps", optim.decay_steps, rule, "shorten one of them")
    elif optim.decay_steps:
        rule = f"is used only with optim.schedule=wsd, not {optim.schedule}"
        _reject("optim.decay_steps", optim.decay_steps, rule, "leave it at 0")
    if optim.schedule == "constant" and optim.final_lr_ratio not in (0.1, 1.0):
        rule = "has no effect with optim.schedule=constant"
        _reject("optim.final_lr_ratio", optim.final_lr_ratio, rule, "leave it at 0.1, or choose cosine or wsd")


def _check_batch(config: Config, world_size: int) -> None:
    train, ranks = config.train, max(1, world_size // (config.parallel.tensor * config.parallel.context))
    refuse([rows_problem(train.global_batch_rows, train.micro_batch_rows, ranks)])


def check_engine(config: Config) -> None:
    """What an engine can do; raises ConfigError at the first rule broken."""
    engine = config.engine
    if engine.zero_stage > 3:
        _reject("engine.zero_stage", engine.zero_stage, "is not a stage of ZeRO", "choose 0, 1, 2 or 3")
    if engine.name == "local" and engine.zero_stage:
        rule = "needs DeepSpeed, and engine.name=local keeps whole optimizer states"
        _reject("engine.zero_stage", engine.zero_stage, rule, "set engine.zero_stage=0, or engine=deepspeed")
    divides = engine.name == "deepspeed" and engine.zero_stage > 0
    mend = "set engine=deepspeed and engine.zero_stage=1, 2 or 3, or leave it out"
    if engine.weights == "bfloat16" and not divides:
        # DeepSpeed's bfloat16 optimizer without ZeRO leaves the other tensor ranks out of the gradient norm.
        _reject("engine.weights", "bfloat16", "needs the float32 values that ZeRO's optimizer keeps", mend)
    if engine.weights == "bfloat16" and config.train.dtype != "bfloat16":
        rule = f"rounds what train.dtype={config.train.dtype} computes with"
        _reject("engine.weights", "bfloat16", rule, "set train.dtype=bfloat16, or engine.weights=float32")
    if engine.offload_optimizer and not divides:
        _reject("engine.offload_optimizer", True, "needs ZeRO's optimizer", mend)


def _check_loop(config: Config) -> None:
    train = config.train
    if train.stop_at_step is not None and not 1 <= train.stop_at_step <= train.steps:
        rule = f"lies outside 1 to train.steps={train.steps}"
        _reject("train.stop_at_step", train.stop_at_step, rule, "stop inside the run, or leave it out")
    if train.validation_interval_steps and not train.validation_batches:
        rule = "asks for validations of train.validation_batches=0 batches"
        _reject("train.validation_interval_steps", train.validation_interval_steps, rule, "set both or neither")
    if train.validation_batches and not config.data.validation:
        rule = "needs data.validation, which names no files"
        _reject("train.validation_batches", train.validation_batches, rule, "name held-out files, or set it to 0")
    _check_bands(train.validation_band_edges_tokens, train.validation_batches, config.data.context_tokens)
    if train.initial == "":
        _reject("train.initial", "''", "is empty", "name a model folder, or leave it out")
    for key in ("name", "run_dir", "data.tokenizer"):
        if not value_at(config, key):
            _reject(key, "''", "is empty", "give it a value")


def _check_bands(edges: list[int], validation_batches: int, context_tokens: int) -> None:
    key = "train.validation_band_edges_tokens"
    if edges and not validation_batches:
        _reject(key, edges, "divides validations of train.validation_batches=0 batches", "set both or neither")
    ends = [0, *edges, context_tokens]
    if any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
        rule = f"does not rise strictly between 0 and data.context_tokens={context_tokens}"
        _reject(key, edges, rule, "sort the edges inside the context, or leave them out")


def _check_checkpoints(checkpoint: CheckpointConfig) -> None:
    kept, interval = checkpoint.keep_every_steps, checkpoint.interval_steps
    if not kept:
        return
    if not checkpoint.keep_last:
        _reject(
            "checkpoint.keep_every_steps", kept, "is ignored where checkpoint.keep_last=0 keeps all", "set one of them"
        )
    if not interval:
        rule = "is ignored where checkpoint.interval_steps=0 saves at the end only"
        _reject("checkpoint.keep_every_steps", kept, rule, "set checkpoint.interval_steps, or leave it at 0")
    if kept % interval:
        near = [kept // interval * interval] if kept > interval else []
        rule = f"is not a multiple of checkpoint.interval_steps={interval}"
        _reject(
            "checkpoint.keep_every_steps", kept, rule, f"choose {listed([*near, (kept // interval + 1) * interval])}"
        )
