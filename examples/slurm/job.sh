#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# A batch job that may take longer than its time limit: it is saved shortly before the limit, put into the queue again, and goes on from
# there. Submit it with: sbatch job.sh
#
#SBATCH --job-name=simulation
#SBATCH --output=simulation-%j.out
#SBATCH --open-mode=append
#SBATCH --time=01:00:00
# The job may be put into the queue again.
#SBATCH --requeue
# USR1 to this script five minutes before the limit: time enough to write the checkpoint.
#SBATCH --signal=B:USR1@300

# The store has to be on a file system that all nodes share, in which the job may go on.
export CKPT_STORE="${CKPT_STORE-$HOME/checkpoints}"

# One name for all runs of this job: its id stays the same when it is put into the queue again.
name="slurm-$SLURM_JOB_ID"

# In the background, so that the shell takes the signal at once.
ckpt run --resume --name "$name" --every 30m --keep 2 --dump-on USR1:stop -- "./simulate" &
trap 'ckpt kill "$name" USR1' USR1
trap 'ckpt kill "$name" TERM' TERM

# `wait` ends when a signal comes, too.
status=129
while [ "$status" -gt 128 ] && kill -0 $! 2>/dev/null; do
    status=0
    wait $! || status=$?
done

# 118: saved and ended.
if [ "$status" -eq 118 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
