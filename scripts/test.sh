#!/usr/bin/env bash
# Runs every gate, cheapest first, and stops at the first that fails; --all adds the tests marked slow
# and installs what they need, and the comparison with OpenAI's own code, in its own environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

extras=cpu,heif,lora,milvus,onnx,quickstart,wandb,test,dev
case "$*" in
  '') tests=(pytest -m 'not slow') ;;
  --all)
    tests=(pytest)
    extras+=,optuna,ray,slurm
    ;;
  *)
    echo "usage: bash scripts/test.sh [--all]" >&2
    exit 1
    ;;
esac

make_environment .venv-test "$extras"
PATH="$PWD/.venv-test/bin:$PATH"

code=(src tests conf)
if [[ -d benchmarks ]]; then code+=(benchmarks); fi

gate() {
  local name=$1 start=$SECONDS status=0
  shift
  printf '\n== %s\n' "$name"
  "$@" || status=$?
  if ((status)); then
    echo "== $name failed" >&2
    exit "$status"
  fi
  echo "== $name passed in $((SECONDS - start)) s"
}

gate "ruff check" ruff check "${code[@]}"
gate "ruff format" ruff format --check "${code[@]}"
gate "mypy" mypy
gate "import-linter" lint-imports --no-logo
gate "shellcheck" shellcheck -x -P SCRIPTDIR scripts/*.sh .ci/run
gate "pytest" "${tests[@]}"
if [[ "$*" == --all ]]; then
  borrow_environment .venv-parity parity .venv-test
  gate "parity" .venv-parity/bin/python -m pytest tests/parity
fi
printf '\nevery gate passed in %d s\n' "$SECONDS"
