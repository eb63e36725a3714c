#!/usr/bin/env bash
# Checks and times what works on this machine's NVIDIA GPU, in ten minutes:  launch/gpu_check.sh [--only PART ...]
#   Uses .venv and creates it if missing. PYTHON=/path/to/python uses an interpreter that has torch and transformers;
#   parts that need packages it lacks are skipped. launch/gpu_check.sh --help lists the parts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo "no GPU to check: nvidia-smi lists none on this machine" >&2
    exit 2
fi
if [[ -z ${PYTHON:-} ]]; then
    launch/setup_env.sh gpu
    PYTHON=.venv/bin/python
fi
export HF_HUB_OFFLINE=1 # the check makes all its models and data itself
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m benchmarks.gpu "$@"
