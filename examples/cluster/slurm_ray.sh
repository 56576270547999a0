#!/bin/bash
# One Ray cluster over the nodes of a job, and on it the processes of a topology: its ranks and its rollout workers, a GPU each.
#   sbatch --nodes=1 examples/cluster/slurm_ray.sh qwen3-4b topologies/8xh100
#   sbatch --nodes=4 examples/cluster/slurm_ray.sh qwen3-4b topologies/32xh100
#SBATCH --job-name=e3rl-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log

set -euo pipefail
recipe=${1:?"usage: sbatch slurm_ray.sh RECIPE TOPOLOGY [section.field=value …]"}
topology=${2:?"usage: sbatch slurm_ray.sh RECIPE TOPOLOGY [section.field=value …]"}
shift 2

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(echo "$nodes" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# Ray asks every node and driver for the same token
umask 077
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/e3rl-$SLURM_JOB_ID"
mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
head -c 32 /dev/urandom | base64 > "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

srun --nodes=1 --ntasks=1 -w "$head" --overlap ray start --head --port="$port" --num-gpus=8 --block &
sleep 20
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" --overlap \
    ray start --address="$head:$port" --num-gpus=8 --block &
  sleep 20
fi

srun --nodes=1 --ntasks=1 -w "$head" --overlap e3rl train "$recipe" --overlay "$topology" --again \
  rollout.address="$head:$port" "$@"
