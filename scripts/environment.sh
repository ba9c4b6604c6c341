# shellcheck shell=bash
# Sourced by the other scripts: goes to the repository root, and makes or finds the Python environment.
cd -P "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# use_environment: twotower is what 0_install.sh installed or, without that, what is on PATH.
use_environment() {
  if [[ -x .venv/bin/twotower ]]; then
    PATH="$PWD/.venv/bin:$PATH"
  elif ! command -v twotower >/dev/null; then
    echo "twotower is not installed; run: bash scripts/0_install.sh" >&2
    exit 1
  fi
}

find_python() {
  local name
  for name in python3 python3.11 python3.12 python3.13 python3.14; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "twotower needs Python 3.11 or newer with venv (on Debian and Ubuntu: apt install python3-venv)" >&2
  exit 1
}

# make_environment FOLDER EXTRAS: a virtual environment with twotower installed from this checkout.
# The stamp is written last, so that an interrupted installation is taken up again.
make_environment() {
  local folder=$1 extras=$2 stamp
  stamp="$PWD [$extras] $(cat setup.cfg setup.py pyproject.toml src/twotower/retrieval/scan/*.[ch] | sha256sum)"
  if up_to_date "$folder" "$stamp"; then return; fi
  empty_environment "$folder"
  echo "installing twotower[$extras] into $folder: minutes and some gigabytes the first time"
  "$folder/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --editable ".[$extras]"
  echo "$stamp" >"$folder/.twotower-stamp"
}

# borrow_environment FOLDER EXTRA FROM: an environment that has what EXTRA lists, without what that
# asks for in turn, and otherwise sees the packages of the environment FROM. Made in seconds.
borrow_environment() {
  local folder=$1 extra=$2 from=$3 stamp requirements
  stamp="$PWD [$extra] from $from $(cat setup.cfg pyproject.toml "$from/.twotower-stamp" | sha256sum)"
  if up_to_date "$folder" "$stamp"; then return; fi
  empty_environment "$folder" "$from/bin/python"
  "$folder/bin/python" -c '
import sys, sysconfig
borrowed = sysconfig.get_path("purelib", vars={"base": sys.argv[1]})
with open(sysconfig.get_path("purelib") + "/borrowed.pth", "w") as file:
    file.write(borrowed)
' "$PWD/$from"
  mapfile -t requirements < <(sed -n "/^$extra =/,/^[^ ]/s/^    //p" setup.cfg)
  echo "installing ${requirements[*]} into $folder, which borrows from $from"
  "$folder/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-deps \
    "${requirements[@]}" --editable .
  echo "$stamp" >"$folder/.twotower-stamp"
}

# up_to_date FOLDER STAMP: whether the environment was finished with this stamp and still works.
up_to_date() {
  [[ "$(cat "$1/.twotower-stamp" 2>/dev/null)" == "$2" ]] && "$1/bin/python" -c '' 2>/dev/null || return
  echo "$1 is up to date: nothing to install"
}

# empty_environment FOLDER [PYTHON]: the environment, made anew unless it is one; its stamp is void.
empty_environment() {
  local folder=$1 python=${2:-}
  # An environment that was moved, copied or lost its Python names another folder, or nothing, here.
  if [[ "$("$folder/bin/pip" --version 2>/dev/null)" != *" from $PWD/$folder/"* ]]; then
    if [[ -e $folder && ! -e $folder/.twotower-stamp ]]; then
      echo "$folder is not a working environment that these scripts made; move it away and try again" >&2
      exit 1
    fi
    if [[ -z $python ]]; then python=$(find_python); fi
    echo "making $folder with $("$python" --version)"
    "$python" -m venv --clear "$folder"
  fi
  echo "unfinished" >"$folder/.twotower-stamp"
}
