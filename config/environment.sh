# Sourced by run_process.sh and tests/run.sh from the repository's root: sets PYTHON to an interpreter that has
# everything in the given requirements files, and makes .venv with them where there is none.
#   PYTHON=/path/to/python   use that interpreter as it is, install nothing

prepare_environment() {
  if [ -n "${PYTHON:-}" ]; then
    return
  fi
  local stamp
  stamp=$(cat "$@" | cksum)
  PYTHON=$PWD/.venv/bin/python
  if [ -x "$PYTHON" ] && [ "$(cat ".venv/$(basename "$1").stamp" 2>/dev/null)" = "$stamp" ]; then
    return
  fi
  echo "setting up .venv from $* (once; a few minutes, about 6 GB) ..."
  local base
  base=$(command -v python3.11 || command -v python3.12 || command -v python3) || {
    echo "no python3 found: install Python 3.11 or newer" >&2
    return 1
  }
  [ -x "$PYTHON" ] || "$base" -m venv .venv
  local file
  for file in "$@"; do
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$file"
  done
  echo "$stamp" >".venv/$(basename "$1").stamp"
}
