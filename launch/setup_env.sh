#!/usr/bin/env bash
# Creates .venv, or recreates it when stale:  launch/setup_env.sh [auto|cpu|gpu] [dev]
#   auto (default) selects gpu if nvidia-smi lists a GPU; dev adds linters and the test runner.
#   PYTHON=/path/to/python selects the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv
python=$venv/bin/python

say() { printf '[set-up %3ss] %s\n' "$SECONDS" "$*"; }
die() {
    printf 'set-up stopped: %s\n' "$1" >&2
    printf '  remedy: %s\n' "${@:2}" >&2
    exit 1
}

kind=${1:-auto}
extras=${2:-}
[[ $kind =~ ^(auto|cpu|gpu)$ && $extras =~ ^(dev)?$ ]] || die "unknown arguments: $*" "launch/setup_env.sh [auto|cpu|gpu] [dev]"
if [[ $kind == auto ]]; then
    kind=cpu
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then kind=gpu; fi
fi

# A stamp records the inputs and the location of the environment: a virtual environment cannot be moved.
key=$({ printf '%s\n' "$root"; cat pyproject.toml launch/setup_env.sh launch/*.py othink_ray/torch_companions.py; } | sha256sum | cut -d' ' -f1)
holds() { [[ -x $python && $(cat "$venv/.othink_ray-$1" 2>/dev/null) == "$key" ]]; }
if holds "$kind-dev" || { [[ -z $extras ]] && holds "$kind"; }; then exit 0; fi

# --- preconditions, checked before any download ---
[[ $(uname -s) == Linux && $(uname -m) =~ ^(x86_64|aarch64)$ ]] ||
    die "vLLM has wheels for Linux on x86_64 and aarch64 only; this is $(uname -s) on $(uname -m)" \
        "use a container: docker build -f docker/Dockerfile.$kind ."
command -v g++ >/dev/null ||
    die "no C++ compiler (g++): DeepSpeed and vLLM compile parts of themselves" "apt-get install g++"

choose_python() {
    local name seen=""
    for name in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13; do
        local version
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        case $version in
            3.11 | 3.12 | 3.13)
                "$name" -c 'import ensurepip, venv' 2>/dev/null ||
                    die "$name ($version) has no venv module" "apt-get install python$version-venv"
                printf '%s\n' "$name"
                return
                ;;
        esac
        seen+=" $name is $version;"
    done
    die "needs Python 3.11, 3.12 or 3.13 (vLLM and Hydra work on no other);${seen:- none found}" \
        "install one (apt-get install python3.11 python3.11-venv) or name it: PYTHON=/path/to/python make demo"
}

# The scripts in bin/ hold the absolute path of the environment; vLLM's CPU and GPU builds exclude each other.
made_as="$kind in $root"
usable() {
    [[ $("$python" -c 'import sys; print(sys.prefix)' 2>/dev/null) == "$venv" ]] &&
        [[ $(cat "$venv/.othink_ray-made" 2>/dev/null || echo "$made_as") == "$made_as" ]]
}
if ! usable; then
    base=$(choose_python)
    needed_gb=$([[ $kind == gpu ]] && echo 16 || echo 8)
    free_gb=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
    ((free_gb >= needed_gb)) ||
        die "only $free_gb GB free on the disk of $root: the $kind environment needs $needed_gb GB" "free some space, or clone to another disk"
    say "creating a virtual environment for $kind ($("$base" --version)) in $venv"
    rm -rf "$venv"
    "$base" -m venv "$venv"
fi
rm -f "$venv"/.othink_ray-{cpu,gpu,cpu-dev,gpu-dev}
echo "$made_as" >"$venv/.othink_ray-made"

# --- torch first: later installs keep the build that is present ---
pip() { "$python" -m pip --disable-pip-version-check "$@"; }
log=$venv/setup.log
: >"$log"
torch=$(sed -n 's/^ *"torch==\([0-9.]*\)".*/\1/p' pyproject.toml)
torch_index=https://download.pytorch.org/whl/cpu
if [[ $kind == gpu ]]; then
    say "torch $torch (CUDA build)"
    pip install -q --no-compile "torch==$torch,!=$torch+cpu" 2>>"$log" ||
        { tail -n 20 "$log" >&2; die "pip found no CUDA build of torch $torch for $("$python" --version)" \
            "check pip's index settings (pip config list) and the network; the whole log is $log"; }
else
    say "torch $torch (CPU build)"
    # Prefer a CPU wheel from pip's configured index. PyPI has the CUDA build only; PyTorch's index has CPU builds of both.
    pip install -q --no-compile "torch==$torch+cpu" 2>>"$log" ||
        { say "no CPU build on the configured index: using $torch_index"
          pip install -q --no-compile --timeout 30 --retries 2 --index-url "$torch_index" "torch==$torch+cpu" torchvision 2>>"$log"; } ||
        { tail -n 20 "$log" >&2; die "no CPU wheel of torch $torch for $("$python" --version) on $(uname -m)" \
            "check that $torch_index is reachable, or point pip to a folder with the wheel: PIP_FIND_LINKS=/path/to/wheels" \
            "another Python may have one: PYTHON=python3.12 make demo"; }
fi

# --- the rest with uv, several times faster; fall back to pip, which honors every pip setting ---
wanted=".[$kind${extras:+,$extras}]"
pip_config=$(pip config list 2>/dev/null || true)
pip_setting() { sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" <<<"$pip_config" | head -n 1; }
install_with_uv() {
    [[ -z $(pip_setting no-index) ]] || return 1
    pip install -q "uv>=0.9,<1" 2>>"$log" || return 1
    local index cert
    index=$(pip_setting index-url)
    cert=$(pip_setting cert)
    [[ -z $index ]] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
    [[ -z $cert ]] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$cert}
    "$venv/bin/uv" pip install -q --python "$python" -e "$wanted" 2>>"$log"
}
say "Ray, vLLM, DeepSpeed, transformers${extras:+, linters, tests} (with uv)"
if ! install_with_uv; then
    say "uv failed (see $log): installing with pip, which takes a minute or two"
    pip install -q --no-compile -e "$wanted" 2>>"$log" ||
        { tail -n 20 "$log" >&2; die "pip could not install $wanted" \
            "the lines above name the package: a wheel may be missing for $("$python" --version) on $(uname -m), or the index may be unreachable" \
            "the whole log is $log"; }
fi

# --- PyPI's torchvision, torchaudio and torchcodec are CUDA builds: make them harmless beside a CPU torch ---
# A copy also works for programs that do not import othink_ray, and leaves the choice of checkout to the import path.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -f "$packages"/othink_ray_torch*
if [[ $kind == cpu ]]; then
    cp othink_ray/torch_companions.py "$packages/othink_ray_torch_companions.py"
    echo "import othink_ray_torch_companions as companions; companions.install()" >"$packages/othink_ray_torch_companions.pth"
fi

# The first import compiles bytecode: do it once here instead of in all workers at the same time.
unset PYTHONDONTWRITEBYTECODE
say "importing all packages once"
"$python" launch/first_import.py "$kind" >>"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; die "the environment is installed but an import fails" "see the lines above; to start from scratch: rm -rf .venv"; }
echo "$key" >"$venv/.othink_ray-$kind${extras:+-$extras}"
say "ready"
