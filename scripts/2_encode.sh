#!/usr/bin/env bash
# Turns pictures and captions into an embedding store; settings as key=value, for example checkpoint=...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment
exec twotower encode "$@"
