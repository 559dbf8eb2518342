"""Settings of a launch, given on the same command line as the run's: `launcher=slurm launcher.nodes=2 experiment=...`.

They are no part of the run: how it is started changes none of its numbers, so they are kept out of its configuration
and its run directory's identity. `launcher=NAME` is a file of configs/launcher/, `launcher=PATH.yaml` a site's own.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NoReturn

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dla_train.config import ConfigError
from dla_train.hydra_app import config_directory
from dla_train.parallel.cores import CHOICES as BINDINGS
from dla_train.parallel.cores import VARIABLE as BIND

KINDS = ("torchrun", "slurm")
PROGRAMS = {"train": "dla_train.train", "doctor": "dla_train.doctor.command"}
"""Module of each `launcher.program`."""
TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){0,2}|\d+")
"""sbatch's formats: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torchrun opens a store for every start of the ranks: in one that it keeps, machines that disagree on how often they
have restarted (one's rank died, the other was told) do not find each other, or find addresses of before."""
OWNED = {
    "OMP_NUM_THREADS": "use launcher.threads_per_rank",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "use launcher.save_seconds",
    "NCCL_SOCKET_IFNAME": "use launcher.interface",
    "GLOO_SOCKET_IFNAME": "use launcher.interface",
    BIND: "use launcher.bind",
    OWN_STORE: "dla-launch sets it: leave it out",
    **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "torchrun sets it: leave it out"),
    **dict.fromkeys(("MASTER_ADDR", "MASTER_PORT"), "torchrun sets it: use launcher.endpoint or launcher.port"),
}
"""Variables that are no part of launcher.environment, and what is used instead."""


@dataclass
class LauncherConfig:
    """How a run is started."""

    kind: str = MISSING
    """`torchrun` on this machine, or `slurm`."""
    program: str = "train"
    """What runs on every rank: `train`, or `doctor`, which checks machines, files and the network instead."""
    preflight: bool = True
    """Look at settings, tokenizer, token files, run_dir and its disk from here first, and start nothing that would
    fail (dla-doctor's checks that need no ranks); false where this machine does not see the run's files."""
    nodes: int = 1
    """Machines."""
    ranks_per_node: int = 0
    """Processes on each; 0 is one per GPU of this machine, one without (torchrun only)."""
    gpus: bool = True
    """Whether the nodes' GPUs are asked for, one a rank (slurm)."""
    cpus_per_rank: int = 8
    """Cores for each process: reading data and saving checkpoints (slurm)."""
    threads_per_rank: int = 0
    """OpenMP threads of a process; 0 is OMP_NUM_THREADS where you set it, else its share of the cores."""
    bind: str = "node"
    """Cores of a process: `node` those of its GPU's NUMA node, `share` a part of them (without a GPU, of all) that no
    other process here has, `none` all that the machine or SLURM gives."""
    interface: str = ""
    """Network interface of NCCL and gloo, the same name on every machine; "" leaves the choice to them."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every process, for NCCL and others; one that is set where you launch wins, "" leaves one out."""
    restarts: int = 3
    """How often all processes are started again in place when one has died or hung."""
    save_seconds: int = 300
    """What a step and a checkpoint may take after a signal before processes are killed."""
    endpoint: str = ""
    """host:port of the first machine, where several meet; start the same command on each (torchrun)."""
    join_seconds: int = 600
    """How long machines wait for one another, at the start and after one was lost."""
    port: int = 0
    """Of the rendezvous, on the first node; 0 is one by the job's number, so that jobs share a node (slurm)."""
    time: str = "24:00:00"
    """Time limit of one job (slurm)."""
    warn_seconds: int = 600
    """How long before the time limit the run is asked to stop and save (slurm)."""
    requeues: int = 50
    """How often a job that was stopped before it finished is queued again (slurm)."""
    partition: str = ""
    """Of the cluster (slurm), as are the next three; "" leaves them to its defaults."""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    setup: str = ""
    """Shell lines before the run on every node, such as `module load` (slurm)."""
    cpu_bind: str = "cores"
    """srun's --cpu-bind for a node's processes together; "" leaves it to the cluster (slurm)."""
    container: str = ""
    """Image for srun's --container-image (slurm with pyxis)."""


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(settings of the launch, settings of the run)."""
    own = [argument for argument in arguments if re.match(r"launcher[.=]", argument)]
    return own, [argument for argument in arguments if argument not in own]


def load_launcher(overrides: Sequence[str], *, ranks_per_node: int = 0) -> LauncherConfig:
    """The settings of `launcher=...` and `launcher.key=value`. Raises ConfigError, naming the nearest key.

    ranks_per_node: where it is not given.
    """
    chosen = [o.removeprefix("launcher=") for o in overrides if o.startswith("launcher=")]
    values = _file(chosen[-1] if chosen else "torchrun")
    values.merge_with(_given(overrides))
    if ranks_per_node and "ranks_per_node" not in values:
        values["ranks_per_node"] = ranks_per_node
    names = [item.name for item in fields(LauncherConfig)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            meant = f"did you mean launcher.{near[0]}?" if near else f"choose from {', '.join(names)}"
            raise ConfigError(f"launcher.{key!s} is not a setting; {meant}")
    if not isinstance(values.get("time", ""), str):
        raise ConfigError(f"launcher.time={values['time']} is a number in the file; write it in quotes: '24:00:00'")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LauncherConfig), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"launcher: {str(error).splitlines()[0]}; give a value of the setting's type") from error
    assert isinstance(config, LauncherConfig)
    _check(config)
    return config


def _file(name: str) -> DictConfig:
    path = Path(name) if name.endswith(".yaml") else config_directory() / "launcher" / f"{name}.yaml"
    if not path.is_file():
        legal = sorted(file.stem for file in (config_directory() / "launcher").glob("*.yaml"))
        raise ConfigError(f"launcher={name} is not there; choose from {', '.join(legal)}, or name a .yaml file")
    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"launcher={name} holds no settings; write it as configs/launcher/slurm.yaml is")
    return loaded


def _given(overrides: Sequence[str]) -> DictConfig:
    """Values as they were written: YAML would read 24:00:00 as a number of seconds."""
    values = OmegaConf.create()
    for item in [o.removeprefix("launcher.") for o in overrides if o.startswith("launcher.")]:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"launcher.{key} has no value; write launcher.{key}=...")
        OmegaConf.update(values, key, value)  # environment.NCCL_DEBUG is a value in a mapping
    return values


def _reject(config: LauncherConfig, key: str, rule: str, mend: str) -> NoReturn:
    raise ConfigError(f"launcher.{key}={getattr(config, key)} {rule}; {mend}")


def _check(config: LauncherConfig) -> None:
    reject = functools.partial(_reject, config)
    if config.kind not in KINDS:
        reject("kind", "is not a kind of launcher", f"choose {' or '.join(KINDS)}")
    if config.program not in PROGRAMS:
        reject("program", "is not a program that can be launched", f"choose {' or '.join(PROGRAMS)}")
    for key in ("nodes", "cpus_per_rank", "save_seconds", "join_seconds"):
        if getattr(config, key) < 1:
            reject(key, "is below 1", "use 1 or more")
    for key in ("ranks_per_node", "threads_per_rank", "restarts", "requeues", "warn_seconds"):
        if getattr(config, key) < 0:
            reject(key, "is below 0", "use 0 or more")
    _check_processes(config)
    if config.port and not 1024 <= config.port <= 65535:
        reject("port", "is not a port that users may open", "choose from 1024 to 65535, or 0")
    if config.kind == "torchrun":
        if config.nodes > 1 and not re.fullmatch(r"[\w.-]+:\d{2,5}", config.endpoint):
            rule = f"machines have no place to meet in launcher.endpoint={config.endpoint!r}"
            reject("nodes", rule, "name the first one and a free port, such as launcher.endpoint=host0:29500")
        if config.nodes == 1 and config.endpoint:
            rule = "is where several machines meet, and launcher.nodes=1"
            reject("endpoint", rule, "leave it out, or set launcher.nodes")
        return
    if config.endpoint:
        reject("endpoint", "is not used with launcher=slurm, whose first node is the place", "leave it out")
    if not TIME.fullmatch(config.time):
        reject("time", "is not a time limit of sbatch", "write hours:minutes:seconds or days-hours:minutes:seconds")
    if not config.ranks_per_node:
        reject("ranks_per_node", "does not say how many processes a node has", "set it to its GPUs, such as 8")
    if limit_seconds(config.time) <= config.warn_seconds:
        rule = f"is not within the limit launcher.time={config.time}"
        reject("warn_seconds", rule, "warn later, or ask for more time")


def _check_processes(config: LauncherConfig) -> None:
    """Where processes compute, and what their environment holds."""
    if config.bind not in BINDINGS:
        _reject(config, "bind", "is not a way to bind processes", f"choose from {', '.join(BINDINGS)}")
    if not re.fullmatch(r"[\w.-]*", config.interface):
        _reject(config, "interface", "is not the name of one network interface", "`ip -brief address` lists them")
    if not re.fullmatch(r"[\w:,=-]*", config.cpu_bind):
        _reject(config, "cpu_bind", "is not a value of srun's --cpu-bind", "use cores, sockets, ldoms or none")
    for name, value in config.environment.items():
        where = f"launcher.environment.{name}={value}"
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ConfigError(f"{where} is not the name of a variable; write one such as NCCL_DEBUG")
        if name in OWNED:
            raise ConfigError(f"{where} is given in another way; {OWNED[name]}")
        if not re.fullmatch(r"[\w.,:;=^/+@%-]*", value):
            mend = "export it yourself, or write the line into launcher.setup (slurm)"
            raise ConfigError(f"{where} holds spaces or signs that a shell reads; {mend}")


def limit_seconds(time: str) -> int:
    """Seconds of a time limit of sbatch."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    if len(parts) == 2:
        return parts[0] * 60 + parts[1]
    return parts[0] * 3600 + parts[1] * 60 + parts[2]
