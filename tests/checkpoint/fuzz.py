"""Checkpoints changed at random: `python -m tests.checkpoint.fuzz --count 5000 --seed 0`.

Half of them are sealed again after the change (new hashes, new marker), as somebody would who wants it loaded. The
outcome must be a typed error or a correct load: any other exception, a crash of the process, more memory than
MEMORY_BYTES or a checkpoint that takes longer than SECONDS ends the program with an error and the seed.
"""

import argparse
import contextlib
import hashlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from dla_train.checkpoint.command import main as command
from dla_train.checkpoint.errors import CheckpointError
from dla_train.checkpoint.manifest import MANIFEST, MARKER, marker_text
from dla_train.checkpoint.resuming import newest_undamaged
from dla_train.checkpoint.stored import StoredCheckpoint
from dla_train.config import ConfigError
from dla_train.hydra_app import config_from_dict
from dla_train.parallel.mesh import Mesh
from tests.checkpoint.small_runs import SmallState, make_config, write_checkpoints

MEMORY_BYTES = 256 * 2**20
SECONDS = 10
STEP = 7
NASTY = (
    0,
    -1,
    2**31,
    2**63,
    10**100,
    1e308,
    float("nan"),
    True,
    None,
    "",
    "../../etc/passwd",
    "\x00",
    [],
    {},
    [[]] * 50,
)


def change_bytes(generator: random.Random, path: Path) -> None:
    """Flip, cut, lengthen, insert, or overwrite with random bytes."""
    content = bytearray(path.read_bytes())
    position, length = generator.randrange(len(content)), generator.choice((1, 2, 8, 64))
    kind = generator.randrange(6)
    if kind == 0:
        content[position] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del content[position:]
    elif kind == 2:
        content += generator.randbytes(length)
    elif kind == 3:
        content[position:position] = generator.randbytes(length)
    elif kind == 4:
        content[position : position + length] = generator.randbytes(length)
    else:
        del content[position : position + length]
    path.write_bytes(content)


def change_header(generator: random.Random, path: Path) -> None:
    """The length of a safetensors header, or a number, name or type in it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if generator.random() < 0.3:
        length = generator.choice((0, 1, length - 1, length + 1, length + 64, len(content), 2**32, 2**63, 2**64 - 1))
    else:
        try:
            header = nasty_value(generator, json.loads(header))
        except ValueError:  # changed before
            return
        length = len(header)
    path.write_bytes(length.to_bytes(8, "little") + header + data)


def nasty_value(generator: random.Random, tree: Any) -> bytes:
    """JSON of the tree with one value replaced, one name changed, or one part deleted or doubled."""
    place: Any = tree
    while True:
        if not isinstance(place, dict | list) or not place:
            return json.dumps(tree).encode()
        key = generator.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or generator.random() < 0.2:
            break
        place = inner
    kind = generator.randrange(4)
    if kind == 0 and isinstance(inner, int) and not isinstance(inner, bool):
        place[key] = inner + generator.choice((-1, 1, 4, 64, 2**32))
    elif kind == 1 and isinstance(place, dict):
        place[generator.choice((key + "x", "", "../x", "model/table", "rng/0/cuda"))] = place.pop(key)
    elif kind == 2:
        del place[key]
    else:
        place[key] = generator.choice(NASTY)
    return json.dumps(tree).encode()


def change_json(generator: random.Random, path: Path) -> None:
    with contextlib.suppress(ValueError):  # changed before
        path.write_bytes(nasty_value(generator, json.loads(path.read_bytes())))


def seal(folder: Path, *, files: bool) -> None:
    """Give the manifest the sizes and hashes of the `files` as they are, and the marker the manifest's hash."""
    path = folder / MANIFEST
    with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
        manifest = json.loads(path.read_bytes())
        for name in manifest["files"] if files else ():
            content = (folder / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path.write_text(json.dumps(manifest))
    (folder / MARKER).write_text(marker_text(hashlib.sha256(path.read_bytes()).hexdigest()))


def change(generator: random.Random, folder: Path) -> None:
    """One to three changes of a checkpoint's files, then perhaps a seal."""
    names = sorted(path for path in folder.rglob("*") if path.is_file())
    sealed = generator.random() < 0.5
    of_manifest = sealed and generator.random() < 0.3
    for _ in range(generator.randint(1, 3)):
        path = folder / MANIFEST if of_manifest else generator.choice(names)
        if path.suffix == ".json" and generator.random() < 0.7:
            change_json(generator, path)
        elif path.suffix == ".safetensors" and generator.random() < 0.6:
            change_header(generator, path)
        elif generator.random() < 0.1:
            other = generator.choice(names)
            first, second = path.read_bytes(), other.read_bytes()
            path.write_bytes(second), other.write_bytes(first)
        elif path.stat().st_size:
            change_bytes(generator, path)
    if sealed:
        seal(folder, files=not of_manifest)


def try_loading(root: Path, mesh: Mesh, expected: dict[str, bytes] | None) -> str:
    """Resume, inspect and read the configuration; the name of what came of it. Other exceptions escape."""
    folder = root / f"step_{STEP:08d}"
    state = SmallState()
    try:
        opened = newest_undamaged(root, state.shapes(), mesh)
        if opened is None:
            return "no checkpoint"
        state.import_state(opened.tensors, opened.step)
    except CheckpointError as error:
        return type(error).__name__
    if expected is not None:
        found = {name: tensor.numpy().tobytes() for name, tensor in opened.tensors.items()}
        assert found == expected, "other tensors were loaded than were written"
    try:
        config_from_dict(StoredCheckpoint(folder).trainer()["config"])
    except ConfigError:
        return "ConfigError"
    return "loaded"


def inspected(run: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            command(["inspect", str(run), "--tensors"])
        except SystemExit as end:
            assert end.code in (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_checkpoints(place / "original", STEP)
        original = place / f"original/run/checkpoints/step_{STEP:08d}"
        tensors = {
            name: t.numpy().tobytes() for name, t in StoredCheckpoint(original).tensors("model", "optim", "rng").items()
        }
        with Mesh.start(make_config(place)) as mesh:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, resource.RLIM_INFINITY))
            for seed in range(options.seed, options.seed + options.count):
                run = place / "run"
                shutil.copytree(original, run / "checkpoints" / original.name)
                folder = run / "checkpoints" / original.name
                change(random.Random(seed), folder)
                resealed = (folder / MANIFEST).read_bytes() != (original / MANIFEST).read_bytes()
                signal.alarm(SECONDS)
                print(f"seed {seed}", file=sys.stderr, flush=True)
                inspected(run)
                outcomes[try_loading(run / "checkpoints", mesh, None if resealed else tensors)] += 1
                signal.alarm(0)
                shutil.rmtree(run)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
