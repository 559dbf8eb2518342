"""The programs of SLURM and munge: what this machine lacks for the tests marked `slurm`, and getting it.

`python -m tests.slurm.packages` installs Debian's packages where they are absent and may be installed; exit code 1 and
one line that says why, where they cannot be.
"""

import os
import shutil
import subprocess
import sys

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
PACKAGES = ("slurm-wlm", "munge")
SYSTEM_FOLDERS = "/usr/sbin:/sbin"
"""Where daemons lie, which is not on every user's path."""
APT = ("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::http::Timeout=30")


def path() -> str:
    """PATH with the daemons."""
    return f"{os.environ['PATH']}:{SYSTEM_FOLDERS}"


def missing() -> str:
    """What this machine lacks, "" for nothing."""
    if os.geteuid() != 0:
        return "needs root, to start munge's and SLURM's daemons"
    absent = _absent()
    return f"needs {', '.join(absent)} (apt install {' '.join(PACKAGES)})" if absent else ""


def install() -> str:
    """Install what is absent, if that can be done here; returns what is still missing."""
    if os.geteuid() != 0 or not _absent() or shutil.which("apt-get") is None:
        return missing()
    done = _apt("install", "--no-install-recommends", *PACKAGES)
    if done.returncode:  # the lists may be absent or old; those that cannot be fetched stay as they are
        _apt("update")
        done = _apt("install", "--no-install-recommends", *PACKAGES)
    errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
    return "; ".join([why, *errors[-1:]]) if (why := missing()) else ""


def _absent() -> list[str]:
    return [command for command in COMMANDS if shutil.which(command, path=path()) is None]


def _apt(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run([*APT, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)


if __name__ == "__main__":
    sys.exit(f"make test-slurm cannot run here: it {why}" if (why := install()) else 0)
