#!/usr/bin/env bash
# Creates .venv-docs, the environment of `make docs`: the packages of the extra `docs`, without torch, Ray and vLLM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$PWD/.venv-docs
packages=$(sed -n '/^docs = \[/,/^\]/s/^ *"\(.*\)",.*/\1/p' pyproject.toml)
key=$({ printf '%s\n' "$venv" "$packages"; cat launch/setup_docs.sh; } | sha256sum | cut -d' ' -f1)
[[ $(cat "$venv/.made" 2>/dev/null) != "$key" ]] || exit 0
echo "[set-up] creating the environment for the documentation in $venv"
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
mapfile -t packages <<<"$packages"
"$venv/bin/python" -m pip --disable-pip-version-check install -q "${packages[@]}" 2>"$venv/setup.log" ||
    { tail -n 20 "$venv/setup.log" >&2; echo "  remedy: check the network; name another Python 3.10 or newer with PYTHON=python3.11 make docs" >&2; exit 1; }
echo "$key" >"$venv/.made"
