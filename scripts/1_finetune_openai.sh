#!/usr/bin/env bash
# Fine-tunes OpenAI's CLIP; settings as key=value, for example data=manifest data.manifest=pairs.csv
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment
exec twotower train model=openai_finetune "$@"
