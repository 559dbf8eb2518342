"""`dla-export`: a checkpoint of a run as a Hugging Face model folder that needs torch and transformers alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from dla_train.config import MISTAKE
from dla_train.data.shard_list import trained_with_bos
from dla_train.evaluate.loading import load_model
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.verify import BOUNDS, Verified
from dla_train.huggingface.writing import SHARD_BYTES, Content, write_folder


def export_run(
    run_dir: Path, output: Path, *, step: int | None = None, dtype: str = "float32", shard_bytes: int = SHARD_BYTES
) -> tuple[Verified, int]:
    """Write the folder; (what its verification found, the step it is of). `step` None takes the newest checkpoint.

    Raises CheckpointError where there is none, TokenizerError, and FolderError, also where the logits do not agree.
    """
    if shard_bytes < 1:
        raise FolderError(f"shard size {shard_bytes} bytes is not above 0; leave it out for {SHARD_BYTES / 1e9:g} GB")
    model, config, chosen = load_model(run_dir, step, dtype=dtype)
    content = Content(
        model=config.model,
        memory=config.memory,
        tensors=model.state_dict(),
        tokenizer=Path(config.data.tokenizer),
        bos=trained_with_bos(config.data),
        context_tokens=config.data.context_tokens,
    )
    return write_folder(content, output, dtype=dtype, shard_bytes=shard_bytes), chosen


_EXAMPLES = """examples:
  dla-export --run runs/my-run --output my-model                       # float32, logits verified before it is kept
  dla-export --run runs/my-run --step 20000 --output my-model --dtype bfloat16 --shard-gigabytes 2
"""


def main(arguments: list[str] | None = None) -> None:
    """Console entry; SystemExit 2 after a mistake that was explained."""
    parser = argparse.ArgumentParser(
        prog="dla-export",
        description="Write a run's model as a Hugging Face folder.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder (config and checkpoints)")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--step", type=int, help="checkpoint to take; by default the newest")
    parser.add_argument("--dtype", choices=sorted(BOUNDS), default="float32", help="of matrices; vectors stay float32")
    parser.add_argument("--shard-gigabytes", type=float, default=SHARD_BYTES / 1e9, help="largest file of weights")
    options = parser.parse_args(arguments)
    try:
        verified, step = export_run(
            options.run,
            options.output,
            step=options.step,
            dtype=options.dtype,
            shard_bytes=int(options.shard_gigabytes * 1e9),
        )
    except (ValueError, OSError) as error:
        parser.exit(MISTAKE, f"dla-export: error: {error}\n")
    print(f"{options.output}: step {step} in {options.dtype}\n{summary(verified, options.dtype)}")


def summary(verified: Verified, dtype: str) -> str:
    """Lines that say what was compared."""
    rounding = "" if dtype == "float32" else f"; from the model in float32 by {verified.rounding:.1g}"
    return (
        f"  read by transformers alone: logits differ by {verified.logits:.1g} of the largest, decoding by "
        f"{verified.decoding:.1g} (bound {verified.bound:g}){rounding}\n"
        f"  tokenizer agrees on {verified.texts} texts"
    )


if __name__ == "__main__":
    main()
