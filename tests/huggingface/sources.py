"""Small random checkpoints of others, as their libraries write them, and what those libraries compute."""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

KERNELS = ("fla", "mamba_ssm", "causal_conv1d")
"""Packages of kernels for GPUs that transformers takes where it finds them, on a CPU too."""
sys.modules.update(dict.fromkeys(KERNELS))  # type: ignore[arg-type]
from transformers import Mamba2Config, Mamba2ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM  # noqa: E402

for _name in KERNELS:
    del sys.modules[_name]


def scatter(model, seed=0):
    """Move every weight at random, so that no two are alike and biases are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def mamba2(folder, **changes):
    settings = {
        "vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 8, "n_groups": 2,
        "state_size": 5, "chunk_size": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    model = scatter(Mamba2ForCausalLM(Mamba2Config(**{**settings, **changes})))
    model.save_pretrained(folder)
    return lambda tokens: model(tokens, use_cache=False).logits


def qwen3_next(folder, **changes):
    settings = {
        "vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 20, "num_experts": 0,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 6,
        "layer_types": ["linear_attention"] * 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    model = scatter(Qwen3NextForCausalLM(Qwen3NextConfig(**{**settings, **changes})))
    model.save_pretrained(folder)
    return lambda tokens: model(tokens, use_cache=False).logits


def state_spaces(folder, **changes):
    """The mamba_ssm layout of the same weights as `mamba2`: other settings, one other name."""
    there = folder.parent / f"{folder.name}_transformers"
    logits = mamba2(there, tie_word_embeddings=True)
    model = Mamba2ForCausalLM.from_pretrained(there)
    tensors = {name.replace("embeddings", "embedding"): x.clone() for name, x in model.state_dict().items()}
    config = {
        "d_model": 24, "d_intermediate": 0, "n_layer": 2, "vocab_size": 61, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True, "attn_layer_idx": [],
        "attn_cfg": {}, "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "ngroups": 2, "d_state": 5},
    }  # fmt: skip
    write(folder, {**config, **changes}, tensors)
    return logits


FLA = {
    "model_type": "gated_deltanet", "vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "head_dim": 5,
    "num_heads": 2, "num_v_heads": 4, "expand_v": 1.2, "hidden_ratio": 4, "intermediate_size": None, "norm_eps": 1e-6,
    "use_gate": True, "use_short_conv": True, "conv_size": 4, "allow_neg_eigval": False, "attn": None,
    "hidden_act": "swish", "tie_word_embeddings": False, "architectures": ["GatedDeltaNetForCausalLM"],
}  # fmt: skip


def gated_deltanet(folder, **changes):
    """flash-linear-attention's layout; its own Triton-free rule computes the mixing, torch the rest."""
    config = {**FLA, **changes}
    generator = torch.Generator().manual_seed(0)
    width, keys, values, heads, inner = 24, 10, 24, 4, 40
    shapes = {"model.embeddings.weight": (64, width), "model.norm.weight": (width,), "lm_head.weight": (64, width)}
    for layer in range(2):
        there = f"model.layers.{layer}"
        shapes |= {f"{there}.{norm}.weight": (width,) for norm in ("attn_norm", "mlp_norm")}
        sizes = {"q": keys, "k": keys, "v": values, "a": heads, "b": heads, "g": values}
        shapes |= {f"{there}.attn.{name}_proj.weight": (size, width) for name, size in sizes.items()}
        shapes |= {f"{there}.attn.{name}_conv1d.weight": (sizes[name], 1, 4) for name in "qkv"}
        if config.get("conv_bias"):
            shapes |= {f"{there}.attn.{name}_conv1d.bias": (sizes[name],) for name in "qkv"}
        shapes |= {f"{there}.attn.{name}": (heads,) for name in ("A_log", "dt_bias")}
        shapes |= {f"{there}.attn.o_norm.weight": (6,), f"{there}.attn.o_proj.weight": (width, values)}
        shapes |= {f"{there}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{there}.mlp.down_proj.weight"] = (width, inner)
    tensors = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    write(folder, config, tensors)
    return lambda tokens: fla_logits(tensors, tokens)


def fla_logits(t, tokens):
    """GatedDeltaNetForCausalLM of fla 0.6, written out: layers/gated_deltanet.py and models/gated_deltanet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no GPU
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def unit(x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    x = t["model.embeddings.weight"][tokens]
    for layer in range(2):
        there = f"model.layers.{layer}"
        hidden = norm(x, t[f"{there}.attn_norm.weight"])
        project = {n: F.linear(hidden, t[f"{there}.attn.{n}_proj.weight"]) for n in ("q", "k", "v", "a", "b", "g")}
        mixed = {}
        for name in ("q", "k", "v"):
            weight, bias = (t.get(f"{there}.attn.{name}_conv1d.{kind}") for kind in ("weight", "bias"))
            series = F.pad(project[name].transpose(1, 2), (3, 0))
            mixed[name] = F.silu(F.conv1d(series, weight, bias, groups=weight.shape[0])).transpose(1, 2)
        q, k = (unit(mixed[name].unflatten(-1, (2, 5))).repeat_interleave(2, dim=2) for name in ("q", "k"))
        decay = -t[f"{there}.attn.A_log"].exp() * F.softplus(project["a"] + t[f"{there}.attn.dt_bias"])
        read = naive_recurrent_gated_delta_rule(q, k, mixed["v"].unflatten(-1, (4, 6)), project["b"].sigmoid(), decay)[
            0
        ]
        gated = norm(read, t[f"{there}.attn.o_norm.weight"]) * F.silu(project["g"].unflatten(-1, (4, 6)))
        x = x + F.linear(gated.flatten(-2), t[f"{there}.attn.o_proj.weight"])
        hidden = norm(x, t[f"{there}.mlp_norm.weight"])
        gate, up = (F.linear(hidden, t[f"{there}.mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, t[f"{there}.mlp.down_proj.weight"])
    return F.linear(norm(x, t["model.norm.weight"]), t["lm_head.weight"])


def write(folder: Path, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous().clone() for name, x in tensors.items()}, folder / "model.safetensors")


SOURCES = {
    "mamba2": mamba2,
    "state-spaces": state_spaces,
    "gated_deltanet": gated_deltanet,
    "qwen3_next": qwen3_next,
}
