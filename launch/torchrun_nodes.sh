#!/usr/bin/env bash
# torchrun on several nodes: run this on each of them, with the same HEAD:
#     HEAD=10.0.0.1:29500 launch/torchrun_nodes.sh NODES RANKS_PER_NODE train.py [arguments]
#
# HEAD is an address of one of the nodes that all can reach, and a port that is free there.
set -euo pipefail

nodes="${1:?number of nodes}"
ranks="${2:?ranks per node}"
shift 2
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Where a host name leads to the wrong network, name the interface: export GLOO_SOCKET_IFNAME=eth1
exec ${DRY_RUN:+echo} torchrun --nnodes "$nodes" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?address:port of the first node}" --rdzv-id "${JOB:-distnorm}" "$@"
