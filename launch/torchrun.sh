#!/usr/bin/env bash
# Train on every device of this machine. Several machines, or checks before the start: dla-launch (docs/launch.md).
#
#   launch/torchrun.sh experiment=... [key=value ...]
#
# RANKS sets the processes (default: one per GPU, one without).
# RESTARTS=n starts all processes again, up to n times, when one has died or hung; they go on from the last checkpoint.
# A rank has its share of the cores as threads, and computes near its GPU (docs/launch.md).
#
# SIGTERM, SIGINT and SIGUSR1 reach every process: the run is saved after its step and ends, status.json says "stopped".
# torchrun would kill its processes after 30 s; SAVE_SECONDS (default 300) is what a step and a checkpoint may take here.
set -euo pipefail

python=${PYTHON:-python}
ranks=${RANKS:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
share=$(($(nproc 2> /dev/null || echo 1) / ranks))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-300} OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
export DLA_BIND=${DLA_BIND:-node} NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export DLA_STARTED="torchrun=$(date +%s.%N)"
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$ranks" --max-restarts="${RESTARTS:-0}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m dla_train.train "$@"
