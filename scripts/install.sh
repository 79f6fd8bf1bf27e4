#!/usr/bin/env bash
# Makes .venv with the package and its tools, in the versions of constraints.txt. Called by the other
# scripts; does nothing when .venv is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  echo "error: Python 3.11 or newer is needed; type PYTHON=/path/to/python3.11 bash scripts/$(basename "${1:-quickstart.sh}")" >&2
  exit 2
}

want=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat .venv/.installed 2>/dev/null)" = "$want" ]; then
  echo "== .venv is up to date"
  exit 0
fi
echo "== installing into .venv (a few minutes the first time; pip says what it does in .venv/pip.log)"
start=$SECONDS
[ -x .venv/bin/python ] || "$python" -m venv .venv
log=.venv/pip.log # no bytecode ahead: of the thousands of modules few are ever imported
.venv/bin/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt torch >"$log" 2>&1 &&
  .venv/bin/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]' >>"$log" 2>&1 || {
  tail -n 5 "$log" >&2
  echo "error: pip could not install the package; the whole log is in $log" >&2
  exit 1
}
echo "$want" >.venv/.installed
echo "== installed in $((SECONDS - start)) s"
