#!/usr/bin/env bash
# Run the whole test suite; makes .venv on the first run. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment "[test]"
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check --quiet .
.venv/bin/python -m mypy
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
