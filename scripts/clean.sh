#!/usr/bin/env bash
# Empties dataset/, models/, logs/, or the stores and indexes under models/; says what, and asks unless --yes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

fail() {
  echo "$1" >&2
  exit 1
}

usage="usage: bash scripts/clean.sh dataset|models|indexes|logs|all [--yes]"
what='' yes=''
for word in "$@"; do
  case $word in
    --yes) yes=1 ;;
    dataset | models | indexes | logs | all)
      [[ -z $what ]] || fail "one thing at a time, or all; $usage"
      what=$word
      ;;
    *) fail "cannot clean $word; $usage" ;;
  esac
done
[[ -n $what ]] || fail "$usage"

case $what in
  all) folders=(dataset models logs) ;;
  indexes) folders=(models) ;;
  *) folders=("$what") ;;
esac
for folder in "${folders[@]}"; do
  if [[ -L $folder ]]; then fail "$folder is a link to another folder; empty that one yourself"; fi
done

# Names end in NUL, since they may hold spaces and line ends; links are named, never followed.
list() {
  local folder
  for folder in "${folders[@]}"; do
    [[ -d $folder ]] || continue
    if [[ $what == indexes ]]; then
      find "$folder" -mindepth 2 -maxdepth 2 \( -name store -o -name index \) -print0
    else
      find "$folder" -mindepth 1 -maxdepth 1 ! -name .gitkeep ! -name README.md -print0
    fi
  done | sort -z
}

mapfile -d '' -t found < <(list)
if ((${#found[@]} == 0)); then
  echo "nothing to delete"
  exit 0
fi
echo "this will be deleted:"
list | du -shc --files0-from=-
if [[ -z $yes ]]; then
  read -r -p "delete it? [y/N] " answer || answer=''
  [[ $answer == [yY] || $answer == [yY]es ]] || fail "nothing was deleted"
fi
printf '%s\0' "${found[@]}" | xargs -0 rm -rf --
echo "deleted"
