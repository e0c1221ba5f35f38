#!/usr/bin/env bash
# torchrun on one node: launch/torchrun.sh RANKS train.py [arguments]. A free port is found; nothing else to set.
set -euo pipefail

ranks="${1:?number of ranks}"
shift
# One thread per rank unless told otherwise: ranks that each use all cores slow each other down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec ${DRY_RUN:+echo} torchrun --standalone --nproc-per-node "$ranks" "$@"
