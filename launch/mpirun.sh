#!/usr/bin/env bash
# Open MPI, any number of nodes: launch/mpirun.sh RANKS train.py [arguments], with HOSTFILE=... for several nodes.
#
# 'python -m mpi4py' makes MPI end the whole job when one rank fails, also by sys.exit. The script calls
# distnorm.integrations.mpi.init_process_group() once, in place of torch.distributed.init_process_group().
set -euo pipefail

options=(-n "${1:?number of ranks}")
shift
[[ -n "${HOSTFILE:-}" ]] && options+=(--hostfile "$HOSTFILE")
# Threads of gloo and of the data loader need cores too: Open MPI must not tie each rank to a single one.
options+=(--bind-to none)
# More ranks than cores, as on a laptop: allowed, and waiting ranks give the core away.
options+=(--oversubscribe --mca mpi_yield_when_idle "${YIELD:-0}")
# In a container one often is root, which mpirun refuses otherwise.
[[ "$(id -u)" == 0 ]] && options+=(--allow-run-as-root)
# Where a host name leads to the wrong network: GLOO_SOCKET_IFNAME (for gradients) and MASTER_ADDR (for the meeting).
for name in OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME MASTER_ADDR MASTER_PORT; do
    [[ -n "${!name:-}" ]] && options+=(-x "$name")
done

exec ${DRY_RUN:+echo} mpirun "${options[@]}" python -m mpi4py "$@"
