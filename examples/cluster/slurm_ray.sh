#!/bin/bash
# One Ray cluster over the nodes of a job: the first node trains, all GPUs but its first generate.
#   sbatch --nodes=4 examples/cluster/slurm_ray.sh qwen3-4b rollout.engine=vllm
#SBATCH --job-name=e3rl-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log

set -euo pipefail
recipe=${1:?"usage: sbatch slurm_ray.sh RECIPE [section.field=value …]"}
shift

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(echo "$nodes" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
gpus=$((8 * SLURM_JOB_NUM_NODES))

# Ray asks every node and driver for the same token
umask 077
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/e3rl-$SLURM_JOB_ID"
mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
head -c 32 /dev/urandom | base64 > "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

# the trainer keeps the head's first GPU to itself
srun --nodes=1 --ntasks=1 -w "$head" --overlap \
  env CUDA_VISIBLE_DEVICES=1,2,3,4,5,6,7 ray start --head --port="$port" --num-gpus=7 --block &
sleep 20
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" --overlap \
    ray start --address="$head:$port" --num-gpus=8 --block &
  sleep 20
fi

srun --nodes=1 --ntasks=1 -w "$head" --overlap env CUDA_VISIBLE_DEVICES=0 e3rl train "$recipe" --again \
  rollout.workers=$((gpus - 1)) rollout.worker_gpus=1 rollout.address="$head:$port" "$@"
