#!/usr/bin/env bash
# Joins the Ray cluster at $RAY_HEAD as a node without CPUs, then serves studies.
# A driver runs on the host of its server, and Ray lets a process join only where a node is.
set -euo pipefail

: "${RAY_HEAD:?set RAY_HEAD to HOST:PORT of the head of Ray}"
until ray start --address="$RAY_HEAD" --num-cpus=0 --num-gpus=0; do
    echo "serve.sh: no head of Ray at $RAY_HEAD yet; the next try is in 5 s" >&2
    sleep 5
done
moenas serve --host 0.0.0.0 --address "$RAY_HEAD" "$@" &
serve=$!
trap 'kill -TERM "$serve" 2>/dev/null || true' TERM INT

# A node ends with its head. Then the server ends too, and what started this script starts both again.
while kill -0 "$serve" 2>/dev/null; do
    if ! grep -qsz 'raylet/[r]aylet' /proc/[0-9]*/cmdline; then
        echo "serve.sh: the node of Ray has ended; the server ends, too" >&2
        kill -TERM "$serve" 2>/dev/null || true
        wait "$serve" || true
        exit 1
    fi
    sleep 5 &
    wait $! || true
done
wait "$serve"
