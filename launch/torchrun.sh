#!/usr/bin/env bash
# Train on every device of this machine, or of several machines.
#
#   launch/torchrun.sh experiment=... [key=value ...]
#
# One machine: RANKS sets the processes (default: one per GPU, one without).
# Several: start it on each with NODES=n, NODE_RANK=0..n-1, MASTER=host:port (of node 0); run_dir must be shared.
set -euo pipefail

python=${PYTHON:-python}
ranks=${RANKS:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if [[ ${NODES:-1} -gt 1 ]]; then
    rendezvous=(--nnodes="$NODES" --node_rank="${NODE_RANK:?set NODE_RANK to 0..NODES-1}"
                --master_addr="${MASTER%:*}" --master_port="${MASTER##*:}")
else
    rendezvous=(--standalone)
fi
exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$ranks" -m dla_train.train "$@"
