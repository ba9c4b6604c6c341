#!/usr/bin/env bash
# Trains OpenAI's CLIP architecture from scratch; settings as key=value, for example train.epochs=5
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment
exec twotower train model=openai_pretrain "$@"
