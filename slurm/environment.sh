# The one place to edit for your cluster's software: sourced by every job of slurm/, on its first node, in the repository's root.

# module purge && module load cuda/12.8

if [ -f .venv/bin/activate ]; then # of `make demo`; or: conda activate csm
    source .venv/bin/activate
fi

# How the nodes talk, where NCCL and gloo choose the wrong network card:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Jobs without internet: models from $HF_HOME, W&B into the run folder, sent later with `wandb sync`.
# export HF_HUB_OFFLINE=1 WANDB_MODE=offline
