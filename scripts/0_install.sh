#!/usr/bin/env bash
# Installs twotower into .venv; other extras as a word: bash scripts/0_install.sh gpu,wandb
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment .venv "${1:-cpu,quickstart}"
echo "the scripts use .venv on their own; for the twotower command in this shell: source .venv/bin/activate"
