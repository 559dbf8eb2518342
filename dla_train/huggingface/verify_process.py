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


def main() -> None:
    """Arguments: the folder, the folder of the questions and answers, tokens to decode one by one."""
    folder, scratch, decoded = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for name in ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark of a module that cannot be imported
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    tokens = load_file(scratch / "tokens.safetensors")["tokens"]
    save_file(_logits(model, tokens, decoded), scratch / "logits.safetensors")
    (scratch / "texts.json").write_text(json.dumps(_texts(folder, json.loads((scratch / "probes.json").read_text()))))


def _logits(model: Any, tokens: Any, decoded: int) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        whole = model(tokens).logits.float()
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
