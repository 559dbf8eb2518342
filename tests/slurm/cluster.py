"""A SLURM cluster of this one machine, from Debian's packages slurm-wlm and munge, for the tests marked `slurm`.

No service manager and no accounting: the daemons are started by hand, with their files in one folder, and ended by it.
Needs root (munge's key belongs to its own user).
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.processes import free_port, state_of
from tests.slurm.packages import path

LOOK_SECONDS = 0.2
# cred_expire is also how long a job that is queued again waits for its new start, by default two minutes
CONFIGURATION = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=15
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
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path()}

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, states: set[str], seconds: float, after: str = "") -> dict[str, str]:
        """Until a job is in one of `states` (after it has been in `after`)."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            job = self.job(number)
            after = "" if job.get("JobState") == after else after
            if job.get("JobState") in states and not after:
                return job
            time.sleep(LOOK_SECONDS)
        raise TimeoutError(f"job {number} is {self.job(number)} after {seconds} s")

    def wait_until_empty(self, seconds: float) -> None:
        """Until no job waits or runs."""
        deadline = time.monotonic() + seconds
        while queue := self.run("squeue", "--noheader").stdout:
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds} s there are still\n{queue}")
            time.sleep(LOOK_SECONDS)


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
    for daemon, question, answer in (
        ("slurmctld", ("scontrol", "ping"), "is UP"),
        ("slurmd", ("sinfo", "--noheader", "--format=%T"), "idle"),
    ):
        subprocess.run([daemon, "-f", str(folder / "slurm.conf")], check=True, env=cluster.environment)
        log = folder / f"{daemon}.log"
        _wait_until(lambda question=question, answer=answer: answer in cluster.run(*question).stdout, log)
    return cluster


def stop(cluster: Cluster) -> None:
    """End jobs that a failed test left, and SLURM's daemons; munge's is left to the machine."""
    cluster.run("scancel", "--me")
    cluster.wait_until_empty(300)
    for name in ("slurmd", "slurmctld"):
        file = cluster.folder / f"{name}.pid"
        if file.exists():
            pid = int(file.read_text())
            os.kill(pid, signal.SIGTERM)
            _wait_until(lambda pid=pid: state_of(pid) == "Z", cluster.folder / f"{name}.log")


def _wait_until(holds: Callable[[], bool], log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {seconds} s; {log} ends with\n{log.read_text()[-2000:]}")
        time.sleep(LOOK_SECONDS)


def _start_munge() -> None:
    if subprocess.run(["pgrep", "-x", "munged"], capture_output=True).returncode == 0:
        return
    for folder in ("/run/munge", "/var/log/munge", "/var/lib/munge", "/etc/munge"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.chown(folder, "munge", "munge")
    shutil.chown("/etc/munge/munge.key", "munge", "munge")
    os.chmod("/run/munge", 0o755)
    command = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged"]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path()})
