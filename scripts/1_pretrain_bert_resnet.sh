#!/usr/bin/env bash
# Trains a dual encoder of any text and any image encoder; settings as key=value
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment
exec twotower train model=bert_resnet "$@"
