#!/usr/bin/env bash
# Checks in ten minutes what works on this machine's NVIDIA GPU, and how fast:  launch/gpu_check.sh [--only PART ...]
#   Uses .venv, which is created if missing. PYTHON=/path/to/python selects an interpreter with torch and transformers;
#   parts whose other dependencies it lacks are skipped. launch/gpu_check.sh --help lists the parts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo "no GPU to check: nvidia-smi lists none on this machine; use one with an NVIDIA GPU and its driver" >&2
    exit 2
fi
if [[ -z ${PYTHON:-} ]]; then
    launch/setup_env.sh gpu
    PYTHON=.venv/bin/python
fi
export HF_HUB_OFFLINE=1 # the check downloads nothing
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m benchmarks.gpu "$@"
