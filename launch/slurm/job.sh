# What the batch scripts beside it have in common; they source it. Exit status of the job:
#
#   0   the run is finished, or was stopped by train.stop_after or by a signal to its ranks
#   1   a rank failed in a way that nobody foresaw, or the run is unfinished and may not be requeued again
#   2   a setting or the data must be mended
#   other: of a run that was cancelled, or ran over its time limit
#
# Needs CODE, RUN_FOLDER, JOB_FOLDER, MAX_RESTARTS, PYTHON, SETUP and RANKS_PER_TASK.
# shellcheck shell=bash disable=SC2153

restarts=${SLURM_RESTART_COUNT:-0}
warned=
terminated=
step=
forwarder=

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID, restart $restarts: $*"; }

# Once more every ten seconds: a rank that has not yet come so far as to listen ignores the first warning.
on_warning() {
    [[ -n $warned ]] && return
    warned=yes
    say "warning before the time limit"
    [[ -n $step ]] || return
    (while kill -s USR1 "$step" 2>/dev/null; do sleep 10; done) &
    forwarder=$!
}

prepare_job() {
    trap on_warning USR1
    trap 'terminated=yes' TERM
    # What an earlier launcher has left in the environment of the submitting shell must not reach the ranks.
    unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
    if [[ -n $SETUP ]]; then
        # shellcheck source=/dev/null
        source "$SETUP" || { say "error: $SETUP failed"; exit 2; }
    fi
    export STATUS_FOLDER=$JOB_FOLDER/status
    rm -rf "$STATUS_FOLDER"
    mkdir -p "$STATUS_FOLDER"
    # The code of this job comes before an installed package.
    export PYTHONPATH=$CODE${PYTHONPATH:+:$PYTHONPATH}
    export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    # srun no longer takes this from the job.
    [[ -n ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    local threads=$((${SLURM_CPUS_PER_TASK:-1} / RANKS_PER_TASK))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    say "on $SLURM_JOB_NODELIST, rendezvous at $MASTER_ADDR:$MASTER_PORT"
}

# Runs a step, passes the warning on to it, and leaves its exit status in `status`.
run_step() {
    status=0
    [[ -n $warned ]] && return
    "$@" &
    step=$!
    while :; do
        wait "$step"
        status=$?
        kill -0 "$step" 2>/dev/null || break
    done
    # Its sleep; it then finds the step gone.
    [[ -n $forwarder ]] && pkill --parent "$forwarder"
    say "the step ended with status $status"
}

is_finished() { grep -qs '"finished": true' "$RUN_FOLDER/summary.json"; }

# Whether a rank, or the step itself, ended with such a status. Of many ranks srun returns the highest status, and
# torchrun always 1; so what the ranks themselves left counts first.
a_rank_ended_with() { cat "$STATUS_FOLDER"/* 2>/dev/null | grep -qxE "$1"; }
step_ended_with() { grep -qxE "$1" <<<"$status"; }

was_cancelled() { [[ -n $terminated ]] && ! scontrol show job "$SLURM_JOB_ID" | grep -q 'Reason=TimeLimit'; }

# Ends the job, or puts it into the queue again.
finish_job() {
    local killed='12[89]|1[3-9][0-9]|2[0-9][0-9]'
    if was_cancelled; then
        say "cancelled; not requeued"
        exit "$status"
    elif a_rank_ended_with 2 || step_ended_with 2; then
        say "something must be mended, see above; not requeued"
        exit 2
    elif a_rank_ended_with 137; then
        requeue "a rank was killed"
    elif a_rank_ended_with 1; then
        # The others end with 3, or are killed, because of it.
        say "a rank failed, see above; not requeued"
        exit 1
    elif a_rank_ended_with "3|$killed" || step_ended_with "3|$killed"; then
        requeue "a rank was lost"
    elif [[ $status != 0 ]]; then
        say "the step failed, see above; not requeued"
        exit 1
    elif is_finished; then
        say "the run is finished"
        exit 0
    elif [[ -n $warned$terminated ]]; then
        requeue "the time was up"
    else
        say "stopped as asked; not requeued"
        exit 0
    fi
}

requeue() {
    if ((restarts >= MAX_RESTARTS)); then
        say "$1; restarted $restarts times already, and no more are allowed; not requeued"
        exit 1
    fi
    say "$1; requeued"
    # SLURM ends this script now.
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID" || { say "error: scontrol requeue failed"; exit 1; }
    exit 0
}
