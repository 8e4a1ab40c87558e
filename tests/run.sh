#!/usr/bin/env bash
# Sets up what is missing, checks the style, runs the tests: bash tests/run.sh [--slow] [pytest arguments]
# --slow: those that take minutes, and only those.
set -euo pipefail
case ${PYTHON:-} in [!/]*/*) PYTHON=$PWD/$PYTHON ;; esac # before the folder changes
cd "$(dirname "$0")/.."
. config/environment.sh
prepare_environment requirements-dev.txt requirements.txt
export HF_HUB_OFFLINE=1
if [ "${1:-}" = --slow ]; then
  set -- -m slow "${@:2}"
else
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
fi
exec "$PYTHON" -m pytest "$@"
