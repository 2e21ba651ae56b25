#!/usr/bin/env bash
# One task per node, all its GPUs: sbatch launch/slurm.sh configs/NAME.py a.b=c ...
#SBATCH --job-name=sdzero
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
# --signal: two minutes before the end every task gets SIGTERM, saves and stops; submit the same command again to go on.
# --requeue: after a preemption or a lost node Slurm starts the job again, and it goes on.
# --cpus-per-task: graders use the cores, a process each, and many clusters give a task one core if nothing is said. Set it
# to what a node has. srun does not take it over from sbatch by itself.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run me with sbatch}"
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" .venv/bin/python run.py "$@"
