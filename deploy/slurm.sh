#!/usr/bin/env bash
#SBATCH --job-name=moenas
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=B:INT@120
# Runs one study on the nodes of a job: sbatch deploy/slurm.sh space.yaml [OVERRIDE ...]
# MOENAS_STORAGE names a PostgreSQL database, and MOENAS_RUNS a URL such as file:///scratch/runs.
# The same command resumes the study after the time limit of the job.
set -euo pipefail

: "${MOENAS_STORAGE:?set it to the URL of a PostgreSQL database}"
: "${MOENAS_RUNS:?set it to a URL that all nodes reach, such as file:///scratch/runs}"

# 1. A token that only this user can read, in a folder that all nodes see.
token="$SLURM_SUBMIT_DIR/.ray_token.$SLURM_JOB_ID"
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1

# 2. The head of Ray on this node, and a node of Ray on each other one.
host="$(hostname --ip-address | cut -d ' ' -f 1)"
port="${RAY_PORT:-6379}"
address="$host:$port"
ray start --head --node-ip-address="$host" --port="$port" --num-cpus="$SLURM_CPUS_PER_TASK" \
    --include-dashboard=false --block &
head=$!
trap 'kill "$head"; wait "$head" || true; rm -f "$token"' EXIT
until ray health-check --address "$address" >/dev/null 2>&1; do
    kill -0 "$head" # ends the script if the head has ended
    sleep 1
done
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
    # srun does not inherit --cpus-per-task of the job.
    srun --nodes="$others" --ntasks="$others" --cpus-per-task="$SLURM_CPUS_PER_TASK" --exclude="$(hostname --short)" \
        ray start --address="$address" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
fi

# 3. The study. Slurm sends SIGINT to this script 120 s before the time limit. A process in the
#    background ignores SIGINT, so it gets SIGTERM.
moenas run "$@" --address "$address" &
study=$!
trap 'kill -TERM "$study"' INT
while true; do
    code=0
    wait "$study" || code=$?
    kill -0 "$study" 2>/dev/null || break # else a signal has ended the wait before the study
done
exit "$code"
