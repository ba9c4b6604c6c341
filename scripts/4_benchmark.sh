#!/usr/bin/env bash
# Compares the exact index with FAISS indexes on the store; settings as key=value
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment
exec twotower benchmark "$@"
