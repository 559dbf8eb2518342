"""`dla-import`: a published single-state model as a model folder of ours, under any memory policy.

The memory's parameters are initialised as in a fresh run: every slot is read with weight 1, and unit weights over any
partition are the single state. So the imported model computes what its source computes, and training goes on from there
(`experiment=upcycle`). Where transformers itself can run the source, logits are compared before the folder is named.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from dla_train.config import MISTAKE, MemoryConfig, ModelConfig
from dla_train.config_rules import validate
from dla_train.data.tokenizer import HUGGING_FACE_FILES
from dla_train.huggingface.conversions import convert
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.export import summary
from dla_train.huggingface.foreign import Source
from dla_train.huggingface.verify import BOUNDS, Verified, source_logits, whole_logits
from dla_train.huggingface.writing import SHARD_BYTES, Content, write_folder
from dla_train.hydra_app import compose
from dla_train.models.init import initial_value
from dla_train.models.language_model import LanguageModel

DEFAULT_CONTEXT_TOKENS = 2048
"""Where the source does not say how long its rows were."""
COMPARED_TOKENS = 64
"""Length of the row on which source and import are compared."""
SOURCE_BOUND = 1e-4
"""Largest difference from the source as a share of the largest logit: float32 sums in another order, over layers."""
_EXAMPLES = """examples:
  dla-import mamba2-780m/ --output mamba2                              # as it is: one state a head
  dla-import mamba2-780m/ memory=dla memory.capacity=16 --output mamba2-dla
  dla-import gdn-1.3B/ memory=dla_rate --tokenizer my.model --dtype bfloat16 --output gdn-dla
  dla-train experiment=upcycle train.initial=mamba2-dla ...            # goes on training it
"""
RUN_BY_TRANSFORMERS = ("mamba2", "qwen3_next")
"""Sources that transformers computes without packages of others."""


@dataclass(frozen=True)
class Imported:
    """What an import found."""

    kind: str
    """What the source was."""
    parameters: int
    """Of the imported model."""
    from_source: float | None
    """Largest difference from the source's logits, as a share of the largest; None where nothing could compute them."""
    verified: Verified


def import_folder(
    source: Path,
    output: Path,
    memory: list[str],
    *,
    name: str | None = None,
    tokenizer: Path | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> Imported:
    """Write `output` from the checkpoint `source` with the memory of the overrides `memory` (`["memory=dla"]`).

    tokenizer: by default the source's own, where it has one. Raises FolderError and ConfigError.
    """
    opened = Source(source)
    kind, model, tensors = convert(opened, name or source.resolve().name)
    config = compose(["experiment=quickstart", *memory])  # a legal run, for its rules
    config.model = model
    validate(config)
    content = Content(
        model=model,
        memory=config.memory,
        tensors=with_memory(model, config.memory, tensors),
        tokenizer=tokenizer or _own_tokenizer(source),
        bos=False,
        context_tokens=opened.config.integer("max_position_embeddings", DEFAULT_CONTEXT_TOKENS),
    )
    from_source = _difference(source, content) if kind in RUN_BY_TRANSFORMERS else None
    verified = write_folder(content, output, dtype=dtype, shard_bytes=shard_bytes)
    return Imported(kind, sum(x.numel() for x in content.tensors.values()), from_source, verified)


def with_memory(model: ModelConfig, memory: MemoryConfig, backbone: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors of the model: those of the backbone, and the memory's own as a fresh run begins with them."""
    shapes = {name: tuple(x.shape) for name, x in LanguageModel(model, memory, device="meta").state_dict().items()}
    fresh = {name for name in shapes if ".reader." in name}
    assert backbone.keys() == shapes.keys() - fresh, sorted(backbone.keys() ^ (shapes.keys() - fresh))
    return {
        name: initial_value(name, shape, 0, model, memory) if name in fresh else backbone[name]
        for name, shape in shapes.items()
    }


def _own_tokenizer(source: Path) -> Path | None:
    return source if any((source / name).is_file() for name in HUGGING_FACE_FILES) else None


def _difference(source: Path, content: Content) -> float:
    """How far the imported model is from its source as transformers computes it. Raises FolderError above the bound."""
    tokens = torch.randint(content.model.vocab_size, (1, COMPARED_TOKENS), generator=torch.Generator().manual_seed(0))
    expected = source_logits(source, tokens)
    found = whole_logits(content.native("float32"), tokens)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= SOURCE_BOUND:
        raise FolderError(
            f"the imported model's logits differ from those of {source} by {difference:.3g} of the largest, more than "
            f"{SOURCE_BOUND:g}; nothing was kept. The source has a feature that its config.json does not name"
        )
    return difference


def main(arguments: list[str] | None = None) -> None:
    """Console entry; SystemExit 2 after a mistake that was explained."""
    parser = argparse.ArgumentParser(
        prog="dla-import",
        description="Make a model folder of a published Mamba-2 or Gated DeltaNet checkpoint.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="checkpoint folder: config.json and safetensors")
    parser.add_argument("overrides", nargs="*", help="memory settings, such as memory=dla_slot or memory.capacity=16")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--name", help="name of the model; by default the source folder's")
    parser.add_argument(
        "--tokenizer", type=Path, help="sentencepiece model or tokenizer folder, if not the source's own"
    )
    parser.add_argument("--dtype", choices=sorted(BOUNDS), default="float32", help="of matrices; vectors stay float32")
    options = parser.parse_intermixed_args(arguments)  # settings may stand behind the options
    try:
        strange = [override for override in options.overrides if not override.startswith("memory")]
        if strange:
            raise FolderError(f"{strange[0]} is no memory setting; the model is the source's. Give memory=... alone")
        memory = options.overrides or ["memory=dla"]
        made = import_folder(
            options.source,
            options.output,
            memory,
            name=options.name,
            tokenizer=options.tokenizer,
            dtype=options.dtype,
        )
    except (ValueError, OSError) as error:
        parser.exit(MISTAKE, f"dla-import: error: {error}\n")
    print(_report(options.output, made, options.dtype))
    if made.from_source is None:
        print("  not compared with the source: transformers alone cannot compute it", file=sys.stderr)


def _report(output: Path, made: Imported, dtype: str) -> str:
    compared = (
        ""
        if made.from_source is None
        else f"\n  logits differ from the source's by {made.from_source:.1g} of the largest"
    )
    return f"{output}: {made.kind}, {made.parameters / 1e6:.1f}M parameters{compared}\n{summary(made.verified, dtype)}"


if __name__ == "__main__":
    main()
