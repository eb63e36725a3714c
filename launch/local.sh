#!/usr/bin/env bash
# One machine (Ray starts inside the run):  launch/local.sh [group=name] [a.b=value] ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/setup_env.sh
exec .venv/bin/python -m othink_ray.main "$@"
