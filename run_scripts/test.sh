#!/usr/bin/env bash
# All tests (some minutes on two cores), or the quick ones: bash run_scripts/test.sh -m "not slow"
source "$(dirname "$0")/setup.sh"

ruff check .
ruff format --check .
python -m pytest tests -q "$@"
