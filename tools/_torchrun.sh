#!/usr/bin/env bash
# _torchrun.sh GPUS SCRIPT ARGUMENTS: what dist_train.sh and dist_test.sh share.
set -euo pipefail
gpus=$1
script=$2
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${MASTER_PORT:-29500}" \
    --nproc_per_node="$gpus" \
    "$(dirname "$0")/$script" "$@" --launcher pytorch
