#!/usr/bin/env bash
# In ten minutes, on a machine with an NVIDIA GPU: what works there, and how fast:  launch/gpu_check.sh [--only PART ...]
#   Python is .venv, made when it is missing. PYTHON=/path/to/python takes one that has torch and transformers already;
#   what else it lacks is skipped, part by part. launch/gpu_check.sh --help lists the parts.
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
export HF_HUB_OFFLINE=1 # everything is made here
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m benchmarks.gpu "$@"
