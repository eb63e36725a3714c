#!/usr/bin/env bash
# Creates .venv-peer, the environment of the system that `make bench` compares with: TRL and versions tested with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$PWD/.venv-peer
key=$(cat launch/setup_peer.sh othink_ray/torch_companions.py | sha256sum | cut -d' ' -f1)
[[ $(cat "$venv/.made" 2>/dev/null) != "$key" ]] || exit 0
echo "[set-up] creating the environment for TRL in $venv (about two minutes)"
rm -rf "$venv"
.venv/bin/python -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@" 2>>"$venv/setup.log"; }
trap '[[ $? == 0 ]] || { tail -n 20 "$venv/setup.log" >&2; echo "  remedy: make bench ARGS=--no-peer benchmarks othink_ray alone" >&2; }' EXIT
pip install "torch==2.13.0+cpu" || pip install --index-url https://download.pytorch.org/whl/cpu "torch==2.13.0+cpu"
pip install "trl==1.16.0" "transformers==5.19.0" "accelerate==1.15.0" "datasets==5.2.0" pillow
pip install --no-deps "torchvision==0.28.0"
pip uninstall -y torchaudio torchcodec || true
# PyPI's torchvision is a CUDA build: declare its missing operators at import.
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp othink_ray/torch_companions.py "$packages/othink_ray_torch_companions.py"
echo "import othink_ray_torch_companions as companions; companions.install()" >"$packages/othink_ray_torch_companions.pth"
echo "$key" >"$venv/.made"
