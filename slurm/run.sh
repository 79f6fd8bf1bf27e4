# Sourced by the batch scripts, with the checkout in `root`, its Python in `python`, the launcher in `launcher` and
# train.py's arguments in "$@": start the run,
# have it stop and save when the time is nearly up, and put the job back into the queue.
#
# SLURM sends USR1 to this shell alone (--signal=B:USR1@180); a STOP file in the run folder, which all nodes
# see, tells the ranks. Signals would not do: torchrun dies of USR1, and leaves its workers 30 s after TERM.
set -uo pipefail
folder=$("$python" "$root/scripts/where.py" "$@") || exit 2
requeue= asked=

stop() {
  asked=yes
  echo "$(date +%T) $1: asking $folder to stop"
}
trap 'requeue=yes; stop "time is nearly up"' USR1
trap 'stop "job is cancelled or preempted"' TERM # SLURM itself decides whether it runs again

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
"${launcher[@]}" "$root/scripts/train.py" "$@" &
child=$!
while kill -0 "$child" 2>/dev/null; do
  if [[ -n $asked ]]; then
    touch "$folder/STOP" # again and again: a run that only just begins takes the first for one left over
    sleep 1
  else
    wait "$child" # a trap ends the wait, not the child
  fi
done
trap '' USR1 TERM
rm -f "$folder/STOP"
status=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1], encoding="utf-8"))["status"])' "$folder/status.json" || echo none)
echo "$(date +%T) $folder: $status"
case $status in
  finished) exit 0 ;;
  diverged) exit 86 ;;
  preempted)
    if [[ -n $requeue && ${SLURM_RESTART_COUNT:-0} -lt ${MAX_RESTARTS:-100} ]]; then
      trap - TERM # SLURM ends this shell by it
      scontrol requeue "$SLURM_JOB_ID" && sleep 60
    fi
    exit 85
    ;;
  *) exit 1 ;;
esac
