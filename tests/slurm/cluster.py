"""A SLURM cluster of this one machine, from Debian's packages slurm-wlm and munge, for the tests marked `slurm`.

No service manager and no accounting: the daemons are started by hand, with their files in one folder, and ended by it.
Needs root (munge's key belongs to its own user).
"""

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults.processes import free_port

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
CONFIGURATION = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=20
JobRequeue=1
SchedulerParameters=sched_interval=2,bf_interval=2
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=INFINITE OverSubscribe=EXCLUSIVE PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """What this machine lacks, "" for nothing."""
    absent = [command for command in COMMANDS if shutil.which(command, path=_path()) is None]
    if absent:
        return f"needs {', '.join(absent)} (apt install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "needs root, to start munge's and SLURM's daemons"


@dataclass
class Cluster:
    """The running daemons."""

    folder: Path

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A command with this cluster's configuration."""
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=self.environment)

    @property
    def environment(self) -> dict[str, str]:
        """Of commands that talk to the cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, states: set[str], seconds: float, after: str = "") -> dict[str, str]:
        """Until a job is in one of `states` (after it has been in `after`).

        A requeued job's two minutes of waiting are cut short.

        Not too short: a start within a second or two of the end is refused, by its own old credential.
        """
        deadline, held = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            job = self.job(number)
            after = "" if job.get("JobState") == after else after
            if job.get("JobState") in states and not after:
                return job
            held = held + 1 if job.get("Reason") == "BeginTime" else 0
            if held == 10:
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
            time.sleep(0.5)
        raise TimeoutError(f"job {number} is {self.job(number)} after {seconds} s")


def start(folder: Path) -> Cluster:
    """Start the daemons and wait for the node."""
    cluster = Cluster(folder)
    host = os.uname().nodename
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = {"controller_port": free_port(), "node_port": free_port()}  # two clusters at a time would share their jobs
    text = CONFIGURATION.format(host=host, folder=folder, cpus=os.cpu_count(), **ports)
    (folder / "slurm.conf").write_text(text)
    _start_munge()
    subprocess.run(["slurmctld", "-f", str(folder / "slurm.conf")], check=True, env=cluster.environment)
    time.sleep(2)
    subprocess.run(["slurmd", "-f", str(folder / "slurm.conf")], check=True, env=cluster.environment)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if "idle" in cluster.run("sinfo", "--noheader", "--format=%T").stdout:
            return cluster
        time.sleep(0.5)
    raise TimeoutError((folder / "slurmctld.log").read_text()[-2000:])


def stop(cluster: Cluster) -> None:
    """End SLURM's daemons; munge's is left to the machine."""
    for name in ("slurmd", "slurmctld"):
        pid = cluster.folder / f"{name}.pid"
        if pid.exists():
            subprocess.run(["kill", pid.read_text().strip()], check=False)
    time.sleep(1)


def _start_munge() -> None:
    if subprocess.run(["pgrep", "-x", "munged"], capture_output=True).returncode == 0:
        return
    for folder in ("/run/munge", "/var/log/munge", "/var/lib/munge", "/etc/munge"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.chown(folder, "munge", "munge")
    shutil.chown("/etc/munge/munge.key", "munge", "munge")
    os.chmod("/run/munge", 0o755)
    command = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged"]
    subprocess.run(command, check=True, env={**os.environ, "PATH": _path()})


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
