#!/usr/bin/env bash
# Run the whole test suite; makes .venv on the first run. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment "[test]"
# Its backend for transformers is tested; what its tasks need besides (190 MB) is not.
.venv/bin/python -c 'import lm_eval' 2>/dev/null ||
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt lm_eval
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check --quiet .
.venv/bin/python -m mypy
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
