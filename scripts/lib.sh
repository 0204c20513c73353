# Shared by demo.sh and test.sh: a .venv beside pyproject.toml that holds this project with one of its extras.
# Sourced, never run. Set PYTHON=/path/to/python to choose the interpreter the .venv is made with.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
PY="$VENV/bin/python"
CPU_INDEX="https://download.pytorch.org/whl/cpu"

say() { printf '%s\n' "$*" >&2; }
die() { say "Error: $*"; exit 1; }

# Prints the interpreter to make .venv with: PYTHON where that is set, else the first that is new enough.
find_python() {
    local candidate version too_old="" no_venv=""
    set -- python3 python python3.11 python3.12 python3.13 python3.14
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; fi
    for candidate in "$@"; do
        version="$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            too_old="$too_old $candidate is $version,"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            no_venv="$candidate"
        else
            printf '%s\n' "$candidate"
            return
        fi
    done
    [ -n "$no_venv" ] &&
        die "$no_venv cannot make virtual environments (no ensurepip). On Debian and Ubuntu: apt install python3-venv; then run this again."
    [ -n "${PYTHON:-}" ] && [ -z "$too_old" ] && die "PYTHON=$PYTHON cannot be run: give the path of a Python 3.11 or newer."
    die "Python 3.11 or newer is needed;${too_old:- none was found,} so install one, or run again with PYTHON=/path/to/python3.11."
}

# Makes .venv if it is not there, and mends one whose making was interrupted.
make_venv() {
    if "$PY" -c 'import pip' 2>/dev/null; then
        "$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            die "$VENV holds $("$PY" --version), Python 3.11 or newer is needed: remove that folder and run this again."
        return
    fi
    local python
    python="$(find_python)" || exit 1
    say "Making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" || die "could not make $VENV (see above). Is the disk full, or the folder not yours?"
}

has_cuda() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

# Succeeds when PyTorch's index of CPU builds answers within a few seconds, name resolution included.
cpu_index_answers() {
    "$PY" - "$CPU_INDEX/torch/" <<'PYTHON'
import os, sys, threading, urllib.request

def ask():
    try:
        with urllib.request.urlopen(sys.argv[1], timeout=4) as answer:
            os._exit(0 if answer.status == 200 else 1)
    except Exception:
        os._exit(1)

threading.Thread(target=ask, daemon=True).start()
threading.Event().wait(6)
os._exit(1)
PYTHON
}

need_space() { # gigabytes
    local free_kb
    free_kb="$(df -Pk "$ROOT" | awk 'NR == 2 {print $4}')"
    [ "$free_kb" -ge "$(($1 * 1000 * 1000))" ] ||
        die "$ROOT has $((free_kb / 1000 / 1000)) GB free, about $1 GB are needed to install. Free some, or move the checkout."
}

# pip install: prints what it downloads, and a plain sentence about why it failed.
pip_install() {
    local log status
    log="$(mktemp)" || die "no temporary file can be made: is the disk full?"
    "$PY" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" 2>&1 |
        tee "$log" | grep --line-buffered -E '^ *(Downloading|Building wheel|ERROR)' >&2
    status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then
        tail -n 15 "$log" >&2
        if grep -qi "no space left on device" "$log"; then
            say "Error: the disk is full. PyTorch with CUDA needs about 10 GB, without it about 2 GB (TMPDIR is used while installing)."
        elif grep -qiE "NewConnectionError|Max retries|name resolution|timed out|unreachable|ProxyError|SSLError" "$log"; then
            say "Error: the package index cannot be reached. Check the network, or point pip at a mirror (pip config set global.index-url URL)."
        else
            say "Error: pip could not install $* (its message is above)."
        fi
        say "What was installed so far is kept: run the same command again to go on."
    fi
    rm -f "$log"
    return "$status"
}

install_torch() {
    local tested found
    tested="$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")"
    found="$("$PY" -c 'from importlib.metadata import version; print(version("torch").split("+")[0])' 2>/dev/null)"
    if [ "$found" = "$tested" ]; then return; fi
    if has_cuda; then
        need_space 12
    else
        need_space 3
        if [ "$(uname -s)" = Linux ] && cpu_index_answers; then
            say "No CUDA driver here: taking PyTorch's CPU build"
            pip_install -c "$ROOT/constraints.txt" --extra-index-url "$CPU_INDEX" torch && return
            say "Going on with the package index that pip is configured for"
        fi
    fi
    say "Installing PyTorch (minutes)"
    pip_install -c "$ROOT/constraints.txt" torch || exit 1
}

# install EXTRA: this project, editable, with an extra. Nothing happens when nothing changed since the last time.
install() {
    local extra="$1" stamp now
    make_venv
    stamp="$VENV/.distilllens-$extra"
    now="$ROOT $(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ]; then return; fi
    install_torch
    say "Installing distilllens with the extra '$extra' (minutes, the first time)"
    pip_install -c "$ROOT/constraints.txt" -e "$ROOT[$extra]" || exit 1
    printf '%s\n' "$now" >"$stamp"
}
