#!/bin/bash
# Training on several nodes with torchrun: every GPU is a rank, ranks share rollouts and gradients.
#   sbatch --nodes=4 examples/cluster/slurm_train.sh qwen3-4b run.name=four-nodes
# The working directory must be on a file system that all nodes see. Submitted again, it goes on with the run.
#SBATCH --job-name=e3rl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log

set -euo pipefail
recipe=${1:?"usage: sbatch slurm_train.sh RECIPE [section.field=value …]"}
shift

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

srun torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" \
  --nproc_per_node 8 \
  --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_backend c10d \
  --rdzv_endpoint "$head:$port" \
  --no-python e3rl train "$recipe" --again train.parallel=zero1 "$@"
