#!/usr/bin/env bash
# Train with one process for each GPU (or, without GPUs, several on the CPU):
#   bash tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# Over several nodes, on each of them, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [arguments of train.py]" >&2
    exit 2
fi
exec bash "$(dirname "$0")/_torchrun.sh" "$2" train.py "$1" "${@:3}"
