#!/bin/bash
# Rollout servers on all nodes but the first, which trains: no Ray needed.
#   sbatch --nodes=4 examples/cluster/slurm_servers.sh qwen3-4b
#SBATCH --job-name=e3rl-servers
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log

set -euo pipefail
recipe=${1:?"usage: sbatch slurm_servers.sh RECIPE [section.field=value …]"}
shift

E3RL_ROLLOUT_TOKEN=$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')
export E3RL_ROLLOUT_TOKEN
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(echo "$nodes" | head -n 1)

servers=""
for node in $(echo "$nodes" | tail -n +2); do
  for gpu in 0 1 2 3 4 5 6 7; do
    srun --nodes=1 --ntasks=1 -w "$node" --overlap --export="ALL,CUDA_VISIBLE_DEVICES=$gpu" \
      e3rl rollout-server "$recipe" --host "$node" --port $((8100 + gpu)) "$@" &
    servers="$servers${servers:+, }\"http://$node:$((8100 + gpu))\""
  done
done
sleep 120

srun --nodes=1 --ntasks=1 -w "$head" --overlap e3rl train "$recipe" --again "rollout.servers=[$servers]" "$@"
