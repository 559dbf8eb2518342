"""Gated DeltaNet checkpoints: flash-linear-attention's layout, and Qwen3-Next's where it has such layers alone."""

from __future__ import annotations

from torch import Tensor

from dla_train.config import ModelConfig
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.foreign import Settings, Source
from dla_train.huggingface.foreign_parts import SILU, Converted, check_groups, convolution, decay, embeddings, mlp


def gated_deltanet(source: Source, name: str) -> Converted:
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
    check_groups(config, model)
    return model, _gated_deltanet_tensors(source, model)


def _gated_deltanet_tensors(source: Source, model: ModelConfig) -> dict[str, Tensor]:
    keys, values = model.num_key_heads * model.key_dim, model.num_heads * model.value_dim
    tensors = embeddings(source, model, "model.embeddings.weight", "model.norm.weight")
    sizes = {"q": keys, "k": keys, "v": values, "a": model.num_heads, "b": model.num_heads, "gate": values}
    for layer in range(model.num_layers):
        there, here = f"model.layers.{layer}", f"blocks.{layer}"
        attn, ours = f"{there}.attn", f"{here}.mixer.backbone"
        for key, size in sizes.items():
            foreign = {"gate": "g"}.get(key, key)
            tensors[f"{ours}.{key}.weight"] = source.take(f"{attn}.{foreign}_proj.weight", size, model.width)
        if model.conv_width:
            for key in ("q", "k", "v"):
                tensors |= convolution(source, f"{attn}.{key}_conv1d", ours, {key: sizes[key]}, model)
        tensors |= decay(source, attn, ours, model.num_heads)
        tensors[f"{ours}.norm.weight"] = source.take(f"{attn}.o_norm.weight", model.value_dim)
        tensors[f"{ours}.out.weight"] = source.take(f"{attn}.o_proj.weight", model.width, values)
        tensors[f"{here}.mixer_norm.weight"] = source.take(f"{there}.attn_norm.weight", model.width)
        tensors[f"{here}.mlp_norm.weight"] = source.take(f"{there}.mlp_norm.weight", model.width)
        tensors |= mlp(source, there, here, model)
    return tensors


def qwen3_next(source: Source, name: str) -> Converted:
    """transformers' Qwen3NextForCausalLM where it has Gated DeltaNet layers and dense MLPs alone."""
    config = source.config
    config.require("hidden_act", SILU, "another activation")
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
    check_groups(config, model)
    keys, values = model.num_key_heads * model.key_dim, model.num_heads * model.value_dim
    tensors = embeddings(source, model, "model.embed_tokens.weight", "model.norm.weight")
    tensors["final_norm.weight"] += 1  # norms there are stored as their distance from 1
    for layer in range(layers):
        there, here = f"model.layers.{layer}", f"blocks.{layer}"
        linear, ours = f"{there}.linear_attn", f"{here}.mixer.backbone"
        tensors |= _qwen3_projections(source, linear, ours, model)
        sizes = {"q": keys, "k": keys, "v": values}
        tensors |= convolution(source, f"{linear}.conv1d", ours, sizes, model)
        tensors |= decay(source, linear, ours, model.num_heads)
        tensors[f"{ours}.norm.weight"] = source.take(f"{linear}.norm.weight", model.value_dim)
        tensors[f"{ours}.out.weight"] = source.take(f"{linear}.out_proj.weight", model.width, values)
        tensors[f"{here}.mixer_norm.weight"] = source.take(f"{there}.input_layernorm.weight", model.width) + 1
        tensors[f"{here}.mlp_norm.weight"] = source.take(f"{there}.post_attention_layernorm.weight", model.width) + 1
        tensors |= mlp(source, there, here, model)
    return model, tensors


def _check_qwen3_layers(config: Settings, layers: int) -> None:
    kinds = config.values.get("layer_types")
    if kinds is None:
        linear = layers < config.integer("full_attention_interval", 4)
    else:
        linear = isinstance(kinds, list) and len(kinds) == layers and all(kind == "linear_attention" for kind in kinds)
    if not linear:
        raise FolderError(
            f"{config.origin}: layer_types has layers of full attention, and a model here has one kind of mixer; "
            "only a Qwen3-Next of linear_attention alone can be imported"
        )
    listed = config.values.get("mlp_only_layers")
    dense = listed if isinstance(listed, list) else []
    experts, step = config.integer("num_experts", 512, least=0), config.integer("decoder_sparse_step", 1)
    # looked for only as far as needed: the number of layers is a file's word
    sparse = next((layer for layer in range(step - 1, layers if experts else 0, step) if layer not in dense), None)
    if sparse is not None:
        raise FolderError(
            f"{config.origin}: num_experts={experts} makes layer {sparse} a mixture of experts, which this model "
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
