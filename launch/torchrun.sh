#!/usr/bin/env bash
# A changing number of machines, from 1 to 4: the same command on each of them, at any time.
#
#   HEAD=10.0.0.1 ./launch/torchrun.sh [flags of covergen.train]
#
# HEAD is the machine where all meet. It must stay: when it dies, so does the run (start it again, it goes on). Any other
# may die or leave; the rest go on from the newest checkpoint, and take in whoever starts this script again.
set -euo pipefail

HEAD=${HEAD:?address of the machine where all meet, e.g. HEAD=10.0.0.1}
NODES=${NODES:-1:4}      # <-- FILL: fewest and most machines
GPUS=${GPUS:-gpu}        # processes a machine; gpu: one for each GPU, a number on machines without
NAME=${NAME:-covergen}   # <-- FILL: the same for all machines of one run, another for another run at the same HEAD
PORT=${PORT:-29500}
ADDRESS=${ADDRESS:-$(ip route get "$HEAD" | sed -n 's/.* src \([^ ]*\).*/\1/p')}  # of this machine, as the others see it
CONFIG=${CONFIG:-$(dirname "$0")/run.yaml}

# Every round of workers meets in a store of its own: one shared with the launchers keeps addresses of the dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

is_host=false
if [[ $ADDRESS == "$HEAD" || $(hostname) == "$HEAD" ]]; then
  is_host=true
fi

# last_call_timeout: seconds to wait for more machines once the fewest are here.
exec torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" --max_restarts 100 --rdzv_backend c10d --rdzv_id "$NAME" \
  --rdzv_endpoint "$HEAD:$PORT" --rdzv_conf "last_call_timeout=15,is_host=$is_host" --local_addr "$ADDRESS" \
  -m covergen.train --config "$CONFIG" "$@"
