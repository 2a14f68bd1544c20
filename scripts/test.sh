#!/usr/bin/env bash
# Sets up what the checks need and runs them: ruff, mypy, pytest with warnings as errors.
#   bash scripts/test.sh            everything that CI runs
#   bash scripts/test.sh --slow     the tests marked `slow` as well
#   FUZZ_CASES=50000 FUZZ_SEED=1 bash scripts/test.sh    more changed files, and others
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh
setup_env dev

marks="not fuzz and not slow and not gpu"
if [ "${1:-}" = "--slow" ]; then
    marks="not fuzz and not gpu"
    shift
fi

ruff check .
ruff format --check .
mypy
OMP_NUM_THREADS=1 python -m pytest -n auto -m "$marks" "$@"
OMP_NUM_THREADS=1 python -m pytest -n auto -m fuzz tests/fuzz
