#!/usr/bin/env bash
# Muon against EMA-Nesterov around Muon, on real text, on the GPU or the CPU it finds: installs, prepares
# the data, trains both, and writes a table, a figure and a page. Run it again: what is done stays done.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh quickstart.sh
start=$SECONDS
echo "== data"
.venv/bin/python scripts/prepare_data.py dataset=sample
for experiment in quickstart/muon quickstart/muon_ema_nesterov; do
  echo "== training $experiment"
  .venv/bin/python scripts/train.py experiment=$experiment "$@"
done
echo "== comparing"
.venv/bin/python scripts/report.py runs=runs/quickstart title="EMA-Nesterov around Muon, or Muon alone"
echo "== done in $((SECONDS - start)) s; open runs/quickstart/report/index.html"
