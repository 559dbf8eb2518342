"""Mamba-2 checkpoints: transformers' layout and that of the mamba_ssm package, which share their tensors' form."""

from __future__ import annotations

from torch import Tensor

from dla_train.config import ModelConfig
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.foreign import Source
from dla_train.huggingface.foreign_parts import SILU, Converted, check_groups, convolution, decay, embeddings

_UNBOUNDED = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])  # the second is how transformers 5 writes it


def mamba2(source: Source, name: str) -> Converted:
    """transformers' Mamba2ForCausalLM."""
    config = source.config
    config.require("use_bias", (False,), "a bias of the projections")
    config.require("hidden_act", SILU, "another activation")
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


def state_spaces(source: Source, name: str) -> Converted:
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
    check_groups(source.config, model)
    tensors = embeddings(source, model, embedding, "backbone.norm_f.weight")
    for layer in range(model.num_layers):
        there, here = f"backbone.layers.{layer}", f"blocks.{layer}"
        mixer, ours = f"{there}.mixer", f"{here}.mixer.backbone"
        tensors[f"{here}.mixer_norm.weight"] = source.take(f"{there}.norm.weight", model.width)
        fused = source.take(f"{mixer}.in_proj.weight", inner + channels + heads, model.width)
        parts = fused.split([inner, inner, state, state, heads])
        tensors |= {f"{ours}.{key}.weight": part for key, part in zip(("z", "x", "B", "C", "dt"), parts, strict=True)}
        sizes = {"x": inner, "B": state, "C": state}
        tensors |= convolution(source, f"{mixer}.conv1d", ours, sizes, model)
        tensors |= decay(source, mixer, ours, heads)
        tensors[f"{ours}.norm.D"] = source.take(f"{mixer}.D", heads)
        tensors[f"{ours}.norm.weight"] = source.take(f"{mixer}.norm.weight", inner)
        tensors[f"{ours}.out.weight"] = source.take(f"{mixer}.out_proj.weight", model.width, inner)
    return tensors
