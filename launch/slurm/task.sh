#!/bin/bash
# Runs a command as the task of a SLURM step, or as a rank below a launcher, and passes signals on.
#
#   task.sh rank COMMAND...        the command is a rank
#   task.sh launcher COMMAND...    the command starts the ranks of this node (torchrun); they are its children
#
# SIGUSR1 is ignored at first: a launcher, or a rank that is still importing, would die of it. Ranks put their own
# handler in its place. The exit status of a rank that failed is left in $STATUS_FOLDER, for the batch script.
set -u

kind=$1
shift
trap '' USR1

if [[ $kind == launcher ]]; then
    # torchrun reads its option --node-rank from here.
    export PET_NODE_RANK=$SLURM_NODEID
fi

"$@" &
command=$!

pass_on() {
    # How far SLURM's own signals reach depends on the site: to this shell alone, or to all processes below it.
    if [[ $kind == rank ]]; then
        kill -s "$1" "$command"
    else
        pkill --signal "$1" --parent "$command"
    fi
} 2>/dev/null
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

# `wait` returns early, with a status above 128, when a signal comes.
while :; do
    wait "$command"
    status=$?
    kill -0 "$command" 2>/dev/null || break
done

if [[ $kind == rank && $status != 0 && -d ${STATUS_FOLDER:-} ]]; then
    # A launcher numbers its ranks; below srun alone the task is the rank.
    echo "$status" >"$STATUS_FOLDER/rank-${RANK:-$SLURM_PROCID}"
fi
exit "$status"
