#!/usr/bin/env bash
# Joins the Ray cluster at $RAY_HEAD as a node without CPUs, then serves studies.
# A driver runs on the host of its server, and Ray lets a process join only where a node is.
set -euo pipefail

: "${RAY_HEAD:?set RAY_HEAD to HOST:PORT of the head of Ray}"
until ray start --address="$RAY_HEAD" --num-cpus=0 --num-gpus=0; do
    echo "serve.sh: no head of Ray at $RAY_HEAD yet; the next try is in 5 s" >&2
    sleep 5
done
exec moenas serve --host 0.0.0.0 --address "$RAY_HEAD" "$@"
