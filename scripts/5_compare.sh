#!/usr/bin/env bash
# Puts the measurements of all runs into one table: which variant wins; settings as key=value
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment
exec twotower compare "$@"
