"""How published single-state models become ours: architecture by architecture, tensor by tensor.

A conversion reads the foreign settings, refuses by name what our backbones cannot express, and returns the backbone's
tensors under logical names. Fused projections are cut into the parts that heads and groups own. The memory's own
parameters are not here: they are initialised so that the model computes what the source does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dla_train.config import ModelConfig
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.foreign import Settings, Source

Converted = tuple[ModelConfig, dict[str, Tensor]]
_UNBOUNDED = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])  # the second is how transformers 5 writes it
_SILU = ("silu", "swish")


def convert(source: Source, name: str) -> tuple[str, ModelConfig, dict[str, Tensor]]:
    """(what it was, our model named `name`, its tensors). Raises FolderError for what cannot be expressed."""
    kind = _kind(source)
    model, tensors = CONVERSIONS[kind](source, name)
    source.check_all_taken()
    return kind, model, tensors


def _kind(source: Source) -> str:
    kind = source.config.values.get("model_type")
    if kind is None and "d_model" in source.config and "n_layer" in source.config:
        return "state-spaces"
    if not isinstance(kind, str) or kind not in CONVERSIONS:
        known = ", ".join(sorted(CONVERSIONS))
        raise FolderError(f"{source.config.origin}: model_type={str(kind)[:40]} is not one that is known: {known}")
    return kind


def _mamba2(source: Source, name: str) -> Converted:
    """transformers' Mamba2ForCausalLM."""
    config = source.config
    config.require("use_bias", (False,), "a bias of the projections")
    config.require("hidden_act", _SILU, "another activation")
    limits = config.values.get("time_step_limit", [0.0, float("inf")])
    if limits not in _UNBOUNDED:
        raise FolderError(
            f"{config.origin}: time_step_limit={str(limits)[:60]} clamps the step sizes, which this model cannot "
            "express; only [0.0, Infinity] can be imported"
        )
    model = ModelConfig(
        name=name,
        backbone="mamba2",
        vocab_size=config.integer("vocab_size", 32768),
        width=config.integer("hidden_size", 4096),
        num_layers=config.integer("num_hidden_layers", 64),
        num_heads=config.integer("num_heads", 128),
        num_key_heads=config.integer("n_groups", 8),
        key_dim=config.integer("state_size", 128),
        value_dim=config.integer("head_dim", 64),
        mlp_width=0,
        conv_width=config.integer("conv_kernel", 4),
        conv_bias=config.flag("use_conv_bias", True),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
    )
    return model, _mamba2_tensors(source, model, "backbone.embeddings.weight")


def _state_spaces(source: Source, name: str) -> Converted:
    """The layout of the `mamba_ssm` package (state-spaces/mamba2-*)."""
    config = source.config
    ssm, padding = config.part("ssm_cfg"), config.integer("pad_vocab_size_multiple", 8)
    ssm.require("layer", ("Mamba1", "Mamba2"), "another mixer")
    if ssm.values.get("layer") != "Mamba2":
        raise FolderError(f"{ssm.origin}: layer={ssm.values.get('layer')} is Mamba-1; only Mamba2 can be imported")
    config.require("d_intermediate", (0,), "an MLP of its own form in every block")
    config.require("attn_layer_idx", ([],), "attention in some layers")
    config.require("rms_norm", (True,), "LayerNorm")
    ssm.require("rmsnorm", (True,), "an output without norm")
    ssm.require("norm_before_gate", (False,), "a norm before the gate")
    ssm.require("D_has_hdim", (False,), "a skip connection per channel")
    ssm.require("bias", (False,), "a bias of the projections")
    ssm.require("d_ssm", (None,), "a mixer beside an MLP")
    limits = ssm.values.get("dt_limit", [0.0, float("inf")])
    if limits not in _UNBOUNDED:
        raise FolderError(f"{ssm.origin}: dt_limit={str(limits)[:60]} clamps the step sizes, which cannot be expressed")
    width = config.integer("d_model")
    head_dim, inner = ssm.integer("headdim", 64), width * ssm.integer("expand", 2)
    if inner % head_dim:
        raise FolderError(f"{ssm.origin}: headdim={head_dim} does not divide {inner}, the inner width")
    vocabulary = config.integer("vocab_size")
    model = ModelConfig(
        name=name,
        backbone="mamba2",
        vocab_size=-(-vocabulary // padding) * padding,
        width=width,
        num_layers=config.integer("n_layer"),
        num_heads=inner // head_dim,
        num_key_heads=ssm.integer("ngroups", 1),
        key_dim=ssm.integer("d_state", 128),
        value_dim=head_dim,
        mlp_width=0,
        conv_width=ssm.integer("d_conv", 4),
        conv_bias=ssm.flag("conv_bias", True),
        tie_embeddings=config.flag("tie_embeddings", True),
        norm_eps=1e-5,
    )
    return model, _mamba2_tensors(source, model, "backbone.embedding.weight")


def _mamba2_tensors(source: Source, model: ModelConfig, embedding: str) -> dict[str, Tensor]:
    inner, state, heads = model.num_heads * model.value_dim, model.num_key_heads * model.key_dim, model.num_heads
    channels = inner + 2 * state
    _check_groups(source.config, model)
    tensors = _embeddings(source, model, embedding, "backbone.norm_f.weight")
    for layer in range(model.num_layers):
        there, here = f"backbone.layers.{layer}", f"blocks.{layer}"
        mixer, ours = f"{there}.mixer", f"{here}.mixer.backbone"
        tensors[f"{here}.mixer_norm.weight"] = source.take(f"{there}.norm.weight", model.width)
        fused = source.take(f"{mixer}.in_proj.weight", inner + channels + heads, model.width)
        parts = fused.split([inner, inner, state, state, heads])
        tensors |= {f"{ours}.{key}.weight": part for key, part in zip(("z", "x", "B", "C", "dt"), parts, strict=True)}
        sizes = {"x": inner, "B": state, "C": state}
        tensors |= _convolution(source, f"{mixer}.conv1d", ours, sizes, model)
        tensors |= _decay(source, mixer, ours, heads)
        tensors[f"{ours}.norm.D"] = source.take(f"{mixer}.D", heads)
        tensors[f"{ours}.norm.weight"] = source.take(f"{mixer}.norm.weight", inner)
        tensors[f"{ours}.out.weight"] = source.take(f"{mixer}.out_proj.weight", model.width, inner)
    return tensors


def _gated_deltanet(source: Source, name: str) -> Converted:
    """flash-linear-attention's GatedDeltaNetForCausalLM."""
    config = source.config
    config.require("use_gate", (True,), "an output without gate")
    config.require("output_gate_activation", ("swish", "silu"), "another output gate")
    config.require("allow_neg_eigval", (False,), "a write strength up to 2")
    config.require("attn", (None,), "attention in some layers")
    config.require("attnres_block_size", (None,), "attention over residuals")
    config.require("hidden_act", ("swish", "silu"), "another activation")
    head_dim, heads = config.integer("head_dim", 256), config.integer("num_heads", 6)
    conv = config.flag("use_short_conv", True)
    model = ModelConfig(
        name=name,
        backbone="gated_deltanet",
        vocab_size=config.integer("vocab_size", 32000),
        width=config.integer("hidden_size", 2048),
        num_layers=config.integer("num_hidden_layers", 21),
        num_heads=config.integer("num_v_heads", heads),
        num_key_heads=heads,
        key_dim=head_dim,
        value_dim=int(head_dim * config.number("expand_v", 2.0)),
        mlp_width=source.shape("model.layers.0.mlp.gate_proj.weight")[0],
        conv_width=config.integer("conv_size", 4) if conv else 0,
        conv_bias="model.layers.0.attn.q_conv1d.bias" in source,
        qk_norm_eps=1e-6,
        tie_embeddings=config.flag("tie_word_embeddings", False),
        norm_eps=config.number("norm_eps", 1e-6),
    )
    _check_groups(config, model)
    keys, values = model.num_key_heads * model.key_dim, model.num_heads * model.value_dim
    tensors = _embeddings(source, model, "model.embeddings.weight", "model.norm.weight")
    sizes = {"q": keys, "k": keys, "v": values, "a": model.num_heads, "b": model.num_heads, "gate": values}
    for layer in range(model.num_layers):
        there, here = f"model.layers.{layer}", f"blocks.{layer}"
        attn, ours = f"{there}.attn", f"{here}.mixer.backbone"
        for key, size in sizes.items():
            foreign = {"gate": "g"}.get(key, key)
            tensors[f"{ours}.{key}.weight"] = source.take(f"{attn}.{foreign}_proj.weight", size, model.width)
        if conv:
            for key in ("q", "k", "v"):
                tensors |= _convolution(source, f"{attn}.{key}_conv1d", ours, {key: sizes[key]}, model)
        tensors |= _decay(source, attn, ours, model.num_heads)
        tensors[f"{ours}.norm.weight"] = source.take(f"{attn}.o_norm.weight", model.value_dim)
        tensors[f"{ours}.out.weight"] = source.take(f"{attn}.o_proj.weight", model.width, values)
        tensors[f"{here}.mixer_norm.weight"] = source.take(f"{there}.attn_norm.weight", model.width)
        tensors[f"{here}.mlp_norm.weight"] = source.take(f"{there}.mlp_norm.weight", model.width)
        tensors |= _mlp(source, there, here, model)
    return model, tensors


def _qwen3_next(source: Source, name: str) -> Converted:
    """transformers' Qwen3NextForCausalLM where it has Gated DeltaNet layers and dense MLPs alone."""
    config = source.config
    config.require("hidden_act", _SILU, "another activation")
    layers = config.integer("num_hidden_layers", 48)
    _check_qwen3_layers(config, layers)
    model = ModelConfig(
        name=name,
        backbone="gated_deltanet",
        vocab_size=config.integer("vocab_size", 151936),
        width=config.integer("hidden_size", 2048),
        num_layers=layers,
        num_heads=config.integer("linear_num_value_heads", 32),
        num_key_heads=config.integer("linear_num_key_heads", 16),
        key_dim=config.integer("linear_key_head_dim", 128),
        value_dim=config.integer("linear_value_head_dim", 128),
        mlp_width=config.integer("intermediate_size", 5632),
        conv_width=config.integer("linear_conv_kernel_dim", 4),
        qk_norm_eps=1e-6,
        tie_embeddings=config.flag("tie_word_embeddings", False),
        norm_eps=config.number("rms_norm_eps", 1e-6),
    )
    _check_groups(config, model)
    keys, values = model.num_key_heads * model.key_dim, model.num_heads * model.value_dim
    tensors = _embeddings(source, model, "model.embed_tokens.weight", "model.norm.weight")
    tensors["final_norm.weight"] += 1  # norms there are stored as their distance from 1
    for layer in range(layers):
        there, here = f"model.layers.{layer}", f"blocks.{layer}"
        linear, ours = f"{there}.linear_attn", f"{here}.mixer.backbone"
        tensors |= _qwen3_projections(source, linear, ours, model)
        sizes = {"q": keys, "k": keys, "v": values}
        tensors |= _convolution(source, f"{linear}.conv1d", ours, sizes, model)
        tensors |= _decay(source, linear, ours, model.num_heads)
        tensors[f"{ours}.norm.weight"] = source.take(f"{linear}.norm.weight", model.value_dim)
        tensors[f"{ours}.out.weight"] = source.take(f"{linear}.out_proj.weight", model.width, values)
        tensors[f"{here}.mixer_norm.weight"] = source.take(f"{there}.input_layernorm.weight", model.width) + 1
        tensors[f"{here}.mlp_norm.weight"] = source.take(f"{there}.post_attention_layernorm.weight", model.width) + 1
        tensors |= _mlp(source, there, here, model)
    return model, tensors


def _check_qwen3_layers(config: Settings, layers: int) -> None:
    kinds = config.values.get("layer_types")
    if kinds is None:
        every = config.integer("full_attention_interval", 4)
        kinds = ["full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in range(layers)]
    if kinds != ["linear_attention"] * layers:
        raise FolderError(
            f"{config.origin}: layer_types has layers of full attention, and a model here has one kind of mixer; "
            "only a Qwen3-Next of linear_attention alone can be imported"
        )
    dense, experts = config.values.get("mlp_only_layers") or [], config.integer("num_experts", 512, least=0)
    step = config.integer("decoder_sparse_step", 1)
    sparse = [layer for layer in range(layers) if experts and layer not in dense and (layer + 1) % step == 0]
    if sparse:
        raise FolderError(
            f"{config.origin}: num_experts={experts} makes layer {sparse[0]} a mixture of experts, which this model "
            "does not have; only dense MLPs (num_experts=0, or mlp_only_layers) can be imported"
        )


def _qwen3_projections(source: Source, there: str, ours: str, model: ModelConfig) -> dict[str, Tensor]:
    """q, k, v and z, and b and a, lie together key head by key head."""
    groups, per_group = model.num_key_heads, model.num_heads // model.num_key_heads
    key, value, width = model.key_dim, per_group * model.value_dim, model.width
    rows = groups * 2 * (key + value)
    grouped = source.take(f"{there}.in_proj_qkvz.weight", rows, width).view(groups, -1, width)
    parts = dict(zip(("q", "k", "v", "gate"), grouped.split([key, key, value, value], dim=1), strict=True))
    grouped = source.take(f"{there}.in_proj_ba.weight", 2 * model.num_heads, width).view(groups, -1, width)
    parts |= dict(zip(("b", "a"), grouped.split([per_group, per_group], dim=1), strict=True))
    return {f"{ours}.{name}.weight": part.flatten(0, 1) for name, part in parts.items()}


def _check_groups(config: Settings, model: ModelConfig) -> None:
    if model.num_heads % model.num_key_heads:
        raise FolderError(
            f"{config.origin}: {model.num_heads} heads do not divide into {model.num_key_heads} groups; mend the file"
        )


def _embeddings(source: Source, model: ModelConfig, embedding: str, norm: str) -> dict[str, Tensor]:
    """Embedding, final norm and head. A tied model may store its matrix twice, alike."""
    shape = (model.vocab_size, model.width)
    tensors = {"embedding.weight": source.take(embedding, *shape), "final_norm.weight": source.take(norm, model.width)}
    if not model.tie_embeddings:
        tensors["head.weight"] = source.take("lm_head.weight", *shape)
    elif "lm_head.weight" in source and not torch.equal(
        source.take("lm_head.weight", *shape), tensors["embedding.weight"]
    ):
        raise FolderError(
            f"{source.folder}: lm_head.weight differs from {embedding}, and config.json says they are tied"
        )
    return tensors


def _convolution(source: Source, there: str, ours: str, sizes: dict[str, int], model: ModelConfig) -> dict[str, Tensor]:
    """Taps [channels, 1, W] and biases of one convolution over the named projections."""
    channels = sum(sizes.values())
    taps = source.take(f"{there}.weight", channels, 1, model.conv_width)[:, 0].split(list(sizes.values()))
    tensors = {f"{ours}.conv.{name}": part for name, part in zip(sizes, taps, strict=True)}
    if model.conv_bias:
        biases = source.take(f"{there}.bias", channels).split(list(sizes.values()))
        tensors |= {f"{ours}.conv.bias_{name}": part for name, part in zip(sizes, biases, strict=True)}
    return tensors


def _decay(source: Source, there: str, ours: str, heads: int) -> dict[str, Tensor]:
    return {f"{ours}.decay.{name}": source.take(f"{there}.{name}", heads) for name in ("A_log", "dt_bias")}


def _mlp(source: Source, there: str, here: str, model: ModelConfig) -> dict[str, Tensor]:
    shapes = {
        "gate": (model.mlp_width, model.width),
        "up": (model.mlp_width, model.width),
        "down": (model.width, model.mlp_width),
    }
    return {
        f"{here}.mlp.{name}.weight": source.take(f"{there}.mlp.{name}_proj.weight", *shape)
        for name, shape in shapes.items()
    }


CONVERSIONS: dict[str, Callable[[Source, str], Converted]] = {
    "mamba2": _mamba2,
    "state-spaces": _state_spaces,
    "gated_deltanet": _gated_deltanet,
    "qwen3_next": _qwen3_next,
}
"""What can be imported, by model_type of its config.json."""
