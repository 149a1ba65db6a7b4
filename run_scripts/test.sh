#!/usr/bin/env bash
# Makes the environment, checks the style and runs the tests: run_scripts/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash run_scripts/setup.sh test
.venv/bin/ruff check .
exec .venv/bin/python -m pytest "$@"
