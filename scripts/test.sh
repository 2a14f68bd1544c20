#!/usr/bin/env bash
# Sets up what the checks need and runs them: ruff, mypy, pytest with warnings as errors.
#   bash scripts/test.sh            everything that CI runs
#   bash scripts/test.sh --slow     the tests marked `slow` as well
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh
setup_env dev

marks="not slow and not gpu"
if [ "${1:-}" = "--slow" ]; then
    marks="not gpu"
    shift
fi

ruff check .
ruff format --check .
mypy
OMP_NUM_THREADS=1 python -m pytest -n auto -m "$marks" "$@"
