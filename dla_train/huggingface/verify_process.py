"""The process that verify.py starts: loads a model folder with transformers alone and writes down what it computes.

Run as a file. Modules of this project and of its trainer are made impossible to import before anything else, so a
folder that leans on them fails here and not at its user's.
"""

import json
import sys
from pathlib import Path
from typing import Any

ABSENT = ("dla_train", "dla_kernels", "data_prep", "megatron", "deepspeed", "omegaconf", "hydra")
"""What a user of the folder need not have."""
KERNELS = ("fla", "mamba_ssm", "causal_conv1d")
"""Kernels for GPUs, which transformers takes where it finds them, on a CPU too."""


def main() -> None:
    """Arguments: the folder, the folder of questions and answers, and how many tokens to decode one by one.

    0 tokens marks a folder of somebody else: none of its code runs, and whole rows in float32 are all that is asked.
    """
    folder, scratch, decoded = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for name in ABSENT + KERNELS:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark of a module that cannot be imported
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    ours, dtype = decoded > 0, "auto" if decoded else "float32"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=ours, local_files_only=True, dtype=dtype)
    tokens = load_file(scratch / "tokens.safetensors")["tokens"]
    save_file(_logits(model.eval(), tokens, decoded), scratch / "logits.safetensors")
    probes = json.loads((scratch / "probes.json").read_text()) if ours else []
    (scratch / "texts.json").write_text(json.dumps(_texts(folder, probes) if ours else []))


def _logits(model: Any, tokens: Any, decoded: int) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits.float()
        if not decoded:
            return {"whole": whole.contiguous()}
        start = max(tokens.shape[1] - decoded, 1)
        out = model(tokens[:, :start], use_cache=True)
        rows = [out.logits[:, -1]]
        for place in range(start, tokens.shape[1]):
            out = model(tokens[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[:, -1])
    return {"whole": whole.contiguous(), "decoded": torch.stack(rows, 1).float()}


def _texts(folder: Path, probes: list[str]) -> list[tuple[list[int], str]]:
    """(ids, text decoded from them) of every probe; nothing without a tokenizer."""
    if not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found = []
    for text in probes:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.append((ids, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)))
    return found


if __name__ == "__main__":
    main()
