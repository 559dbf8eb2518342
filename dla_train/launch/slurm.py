"""The batch script of a run on SLURM: one torchrun a node, started by srun.

Before the time limit SLURM sends SIGUSR1 to the batch shell, on preemption SIGTERM; both are passed on to srun, which
sends them to every process. The run then saves and says `stopped` in status.json, and the script queues itself again,
up to a limit, unless the job was cancelled. A run that ends in any other way ends the job, with torchrun's exit code.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dla_train.launch.environment import exports
from dla_train.launch.settings import PROGRAMS, LauncherConfig
from dla_train.resilience.exit_codes import STATUS_FILE

STAY_FILE = "stay_stopped"
"""In run_dir: the job, once it was asked to stop, is not queued again."""

SCRIPT = """#!/usr/bin/env bash
{directives}
set -uo pipefail
{setup}
{environment}
export DLA_STARTED="srun and torchrun=$(date +%s.%N)"
status={status}
# a task of an array is told its name: its number alone may be the whole array's
job=${{1:-$SLURM_JOB_ID}}
echo "$(date +%FT%T) job $job, start ${{SLURM_RESTART_COUNT:-0}}, on $SLURM_JOB_NODELIST"
rm -f "$status" {stay}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port={port}

srun --kill-on-bad-exit=1 --cpus-per-task={cores}{cpu_bind}{container} {python} -m torch.distributed.run \\
    --nnodes="$SLURM_NNODES" --nproc-per-node={ranks} --max-restarts={restarts} \\
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}" \\
    --rdzv-conf=join_timeout={join_seconds} \\
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \\
    -m {module} {run} &
child=$!
asked=
pass_on() {{
    [ -z "$asked" ] || return 0
    asked=$1
    echo "$(date +%FT%T) $1: the run is asked to stop"
    kill -"$1" "$child"
}}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
while kill -0 "$child" 2> /dev/null; do wait "$child"; code=$?; done
trap - USR1 TERM
echo "$(date +%FT%T) torchrun ended with $code"

# a signal that comes with the last step ends torchrun with an error, though the run is finished
state=$(grep -o '"state": "[a-z]*"' "$status" 2> /dev/null | cut -d '"' -f 4)
[ "$state" = finished ] && exit 0
# one that comes before the first step finds nothing to save
if [ "$state" = stopped ] || {{ [ -n "$asked" ] && [ "$state" != diverged ]; }}; then
    # SLURM itself ends a job that was cancelled, or preempted for longer than it takes to save: `requeue` would bring
    # back the first, and the second comes back without it. After the warning the time limit may be what ended it
    if [ "$asked" != USR1 ] && [[ $(scontrol show job "$job") == *JobState=COMPLETING* ]]; then
        echo "$(date +%FT%T) ${{state:-not begun}}; it stays so, unless SLURM queues it again"
        exit 75
    fi
    if [ -e {stay} ]; then
        echo "$(date +%FT%T) ${{state:-not begun}}; it stays so"
        exit 75
    fi
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
        echo "$(date +%FT%T) ${{state:-not begun}}; queued again"
        scontrol requeue "$job" && sleep 60
    fi
    echo "launcher.requeues={requeues} is used up; submit again to go on" >&2
    exit 75
fi
exit "$code"
"""


class SubmitError(RuntimeError):
    """SLURM does not take the job."""


def submit(script: Path) -> str:
    """Queue a batch script; the number of the job. Raises SubmitError with SLURM's reason."""
    return _sbatch([str(script)], None).strip().split(";")[0]


def try_submission(text: str) -> None:
    """Ask SLURM whether it would take a batch script; nothing is queued. Raises SubmitError with its reason."""
    _sbatch(["--test-only"], text)


def _sbatch(arguments: Sequence[str], text: str | None) -> str:
    if shutil.which("sbatch") is None:
        mend = "log in to the cluster, or use launcher=torchrun"
        raise SubmitError(f"launcher.kind=slurm needs sbatch, which is not on this machine's path; {mend}")
    done = subprocess.run(["sbatch", "--parsable", *arguments], input=text, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()
        raise SubmitError(f"sbatch refused the job: {reason}; mend launcher.* and try again")
    return done.stdout


def job_script(
    launcher: LauncherConfig, name: str, run_dir: Path, run: Sequence[str], python: str, output: Path
) -> str:
    """The batch script that runs the program with the settings `run`, for the run `name` in `run_dir`.

    output: file of its log, with sbatch's %j for the job's number.
    """
    state = run_dir.resolve() if launcher.program == "train" else output.parent  # a run's own state is left alone
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in directives(launcher, name, output)),
        setup=launcher.setup.strip() or "# launcher.setup adds lines here",
        environment=exports(launcher),
        cores=_node_cores(launcher),
        cpu_bind=f" --cpu-bind={launcher.cpu_bind}" if launcher.cpu_bind else "",
        status=shlex.quote(str(state / STATUS_FILE)),
        stay=shlex.quote(str(state / STAY_FILE)),
        container=f" --container-image={shlex.quote(launcher.container)}" if launcher.container else "",
        python=shlex.quote(python),
        ranks=launcher.ranks_per_node,
        restarts=launcher.restarts if launcher.program == "train" else 0,
        module=PROGRAMS[launcher.program],
        port=launcher.port or "$((20000 + SLURM_JOB_ID % 20000))",
        join_seconds=launcher.join_seconds,
        requeues=launcher.requeues,
        run=shlex.join(run),
    )


def _node_cores(launcher: LauncherConfig) -> int:
    """Asked for the job and said to srun again: since SLURM 22.05 a step takes them over from the job no more."""
    return launcher.cpus_per_rank * launcher.ranks_per_node


def directives(launcher: LauncherConfig, name: str, output: Path) -> list[str]:
    """Options of sbatch for a run of this name, whose log is `output`."""
    lines = [
        f"--job-name={name}",
        f"--nodes={launcher.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={_node_cores(launcher)}",
        f"--time={launcher.time}",
        f"--signal=B:USR1@{launcher.warn_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={output}",
    ]
    if launcher.gpus:
        lines.append(f"--gpus-per-node={launcher.ranks_per_node}")
    given = {key: getattr(launcher, key) for key in ("partition", "account", "qos", "constraint")}
    return lines + [f"--{key}={value}" for key, value in given.items() if value]
