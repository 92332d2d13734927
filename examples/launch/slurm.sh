#!/usr/bin/env bash
# Two machines of eight GPUs under Slurm: sbatch examples/launch/slurm.sh RECIPE [key.path=value …]
#
# One launcher a machine, one process a GPU. Two minutes before the time is up, and when the job is preempted, Slurm
# sends SIGTERM: every process gets it and the run saves, the job is queued again, and --resume goes on from the newest
# checkpoint, or starts where there is none yet. Recipe, data and outputs must lie on a file system that all machines
# see.
#SBATCH --job-name=vlm-sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -euo pipefail

CONFIG=${CONFIG:-accelerate_configs/multi_node_fsdp2.yaml} # or multi_node_zero3.yaml
GPUS=${SLURM_GPUS_ON_NODE:-8}
mapfile -t MACHINES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
FIRST=${MACHINES[0]}
PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one machine do not meet

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # compute nodes often have no way out; fetch the pieces beforehand
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 # seconds that torch's launcher gives the processes after SIGTERM

# With B: only this script gets the signal. srun passes it on to its tasks, and torch's launcher to its processes.
STOPPED=
trap 'STOPPED=1; kill -TERM $!' TERM

# SLURM_NODEID is known on each machine only, so the command is put together there.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$0" \
        --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$((SLURM_JOB_NUM_NODES * $1))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$2" --main_process_port "$3" \
        -m vlm_sft.train --resume "${@:4}"
' "$CONFIG" "$GPUS" "$FIRST" "$PORT" "$@" &

STATUS=0
wait $! || STATUS=$?
if [ -n "$STOPPED" ]; then
    wait $! || true # the first wait ended with the signal; what the run still writes is written during this one
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$STATUS"
