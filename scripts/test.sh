#!/usr/bin/env bash
# Everything a change must pass: makes .venv if needed, then runs the tests (ruff, pyright and import-linter are among them).
# Arguments go to pytest: `bash scripts/test.sh tests/unit -k lens`.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

unset PYTHONPATH PYTHONHOME
if command -v git >/dev/null 2>&1; then # inside a git hook these point at another repository's state
    # shellcheck disable=SC2046
    unset $(git rev-parse --local-env-vars)
fi

install dev
cd "$ROOT" || exit 1
# One thread per worker: two cores are shared by two workers, and sums come out in the same order everywhere.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
exec "$PY" -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@" </dev/null
