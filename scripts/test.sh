#!/usr/bin/env bash
# Run the whole test suite; makes .venv on the first run. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment "[test]"
# lm_eval and what importing it needs; what its metrics need besides, most of 190 MB, is not tested.
.venv/bin/python -c 'import lm_eval.evaluator' 2>/dev/null ||
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
    lm_eval sacrebleu colorama lxml portalocker tabulate
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check --quiet .
.venv/bin/python -m mypy
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
