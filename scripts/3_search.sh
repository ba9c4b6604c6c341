#!/usr/bin/env bash
# Searches the store: query='a dog on the beach' or query_image=dog.jpg; without either it asks for queries
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment
exec twotower search "$@"
