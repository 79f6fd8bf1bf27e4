#!/usr/bin/env bash
# Lint, types and tests, with what they need installed into .venv. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh test.sh
echo "== ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy >.venv/mypy.log 2>&1 & # beside the tests: it takes one core for a minute
mypy=$!
echo "== pytest"
tests=0 # four workers on two cores: many tests wait for processes of their own
.venv/bin/python -m pytest -n 4 --dist worksteal "$@" || tests=$?
echo "== mypy"
types=0
wait "$mypy" || types=$?
cat .venv/mypy.log
exit $((tests ? tests : types))
