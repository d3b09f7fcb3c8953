#!/bin/bash
# sbatch configs/launch/slurm.sh
#
# Two nodes with eight GPUs each, from a folder that all nodes share: runs/ and the caches lie there.
# If a process is killed, torchrun starts all of them again, and the run resumes from its last checkpoint. If the job
# is requeued, it does the same.
#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export HF_HOME="$PWD/.cache/huggingface" XDG_CACHE_HOME="$PWD/.cache"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max-restarts=3 --shutdown-timeout=150 \
    --rdzv_backend=c10d --rdzv_endpoint="$first_node:29500" --rdzv_id="$SLURM_JOB_ID" \
    train.py --config configs/alpaca.yaml --output_dir runs/alpaca_slurm \
    --train.global_batch_size 64
