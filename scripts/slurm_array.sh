#!/usr/bin/env bash
# Extract in N parts on a SLURM cluster: sbatch scripts/slurm_array.sh DATA CACHE --backbone NAME [OPTIONS OF EXTRACT]
# Then, when all have ended, the same featcache extract without --part merges them and writes CACHE:
#   id=$(sbatch --parsable scripts/slurm_array.sh DATA CACHE --backbone NAME)
#   sbatch --dependency="afterany:$id" --wrap "featcache extract DATA CACHE --backbone NAME"
# It names parts that are missing, and does them. A part alone again: sbatch --array=3 scripts/slurm_array.sh ...
#SBATCH --job-name=featcache
#SBATCH --array=1-16
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
# How many parts, as in --array above. Not SLURM_ARRAY_TASK_COUNT, which is the number of tasks that
# were submitted: of a part that runs again alone, that is 1.
parts=${FEATCACHE_PARTS:-16}
# srun no longer takes over sbatch's --cpus-per-task by itself.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
# The signal before the time is up goes to the step, featcache itself (no B: in --signal, which means
# this script: an srun that gets SIGTERM kills its step). The part then writes the shard in hand; run
# again, by --requeue or by hand, it goes on there.
exec srun featcache extract "$@" --part "${SLURM_ARRAY_TASK_ID:?is set by sbatch --array}/$parts"
