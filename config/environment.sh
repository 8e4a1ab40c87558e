# Sourced by run_process.sh and tests/run.sh from the repository's root: sets PYTHON to an interpreter that has
# everything in the given requirements files, and makes .venv with them, in the versions of requirements.lock, where it
# is missing.
#   PYTHON=/path/to/python   use that interpreter as it is, install nothing

find_python() {
  local candidate
  for candidate in python3.11 python3 python3.12 python3.13; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11 or newer found: install one, or set PYTHON to one that has requirements.txt" >&2
  return 1
}

prepare_environment() {
  if [ -n "${PYTHON:-}" ]; then
    return
  fi
  PYTHON=$PWD/.venv/bin/python
  local file
  for file in "$@"; do
    if ! installed "$file"; then
      ( # one at a time
        if command -v flock >/dev/null && ! flock -n 8; then
          echo "another command installs into .venv: waiting for it ..."
          flock 8 || echo "no lock on .venv.lock: installing without one" >&2
        fi
        installed "$file" || install "$file"
      ) 8>>.venv.lock || return 1
    fi
  done
}

installed() {
  [ -x "$PYTHON" ] && cat "$1" requirements.lock | cmp -s - ".venv/$(basename "$1")"
}

install() {
  local base
  echo "installing $1 into .venv (once; requirements.txt takes a few minutes and about 6 GB) ..."
  base=$(find_python) || return 1
  "$base" -m venv .venv || return 1
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1" -c requirements.lock || return 1
  cat "$1" requirements.lock >".venv/$(basename "$1")" # what is installed; a changed file is installed again
}
