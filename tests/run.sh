#!/usr/bin/env bash
# Sets up what is missing, checks the style, runs the tests: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. config/environment.sh
prepare_environment requirements-dev.txt requirements.txt
export HF_HUB_OFFLINE=1
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
