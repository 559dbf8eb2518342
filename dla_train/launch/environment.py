"""What a launch puts into the environment of its ranks: NCCL's settings, the network interface, threads and binding.

A variable that stands in the environment of the launch wins over the configuration's, so that a site's module files and
`NCCL_DEBUG=INFO dla-launch ...` do what they say; a setting of its own, such as `launcher.interface`, wins over both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from dla_train.launch.settings import OWN_STORE, LauncherConfig
from dla_train.parallel.cores import VARIABLE as BIND
from dla_train.parallel.cores import available_cores


def defaults(launcher: LauncherConfig) -> dict[str, str]:
    """Variables for which the environment of the launch wins; "" in the configuration leaves one out."""
    return {name: value for name, value in launcher.environment.items() if value}


def fixed(launcher: LauncherConfig) -> dict[str, str]:
    """Variables that settings of their own give."""
    interface = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), launcher.interface)
    shutdown = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(launcher.save_seconds), BIND: launcher.bind, OWN_STORE: "1"}
    threads = {"OMP_NUM_THREADS": str(launcher.threads_per_rank)} if launcher.threads_per_rank else {}
    return shutdown | threads | (interface if launcher.interface else {})


def environment_here(launcher: LauncherConfig, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of ranks that are started from this process, with the values that hold."""
    threads = {"OMP_NUM_THREADS": str(max(1, available_cores() // launcher.ranks_per_node))}
    return {name: given.get(name, value) for name, value in (threads | defaults(launcher)).items()} | fixed(launcher)


def exports(launcher: LauncherConfig) -> str:
    """The same as lines of a batch script, which runs where SLURM says."""
    threads = {"OMP_NUM_THREADS": str(launcher.cpus_per_rank)}
    soft = [f'export {name}="${{{name}:-{value}}}"' for name, value in (threads | defaults(launcher)).items()]
    return "\n".join([*soft, *(f"export {name}={value}" for name, value in fixed(launcher).items())])
