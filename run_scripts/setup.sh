# Sourced by the other scripts: create .venv and install what is pinned, unless that is done already.
#
#   source run_scripts/setup.sh        # afterwards python, deepspeed and pytest are those of .venv
#
# Nothing is installed again while requirements*.txt are unchanged. Where there is an NVIDIA driver the CUDA build of torch
# is required; elsewhere the build that the package index offers is taken as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local name
    for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$name" ] && command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python 3.11 or newer found (3.11 is what is tested). Install one, or set PYTHON to it." >&2
    return 1
}

wanted=$(cat requirements.txt requirements-dev.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/installed.sha256 2>/dev/null || true)" != "$wanted" ]; then
    python=$(find_python)
    echo "setting up .venv with $python; the first time this takes some minutes"
    if ! "$python" -m venv .venv; then
        echo "error: $python cannot create a virtual environment (Debian: apt-get install python3-venv)." >&2
        exit 1
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
    echo "$wanted" >.venv/installed.sha256
fi
export PATH="$PWD/.venv/bin:$PATH"

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "error: there is an NVIDIA driver, but torch $(python -c 'import torch; print(torch.__version__)') sees no card." >&2
        echo "       Install the CUDA build of the pinned torch that fits the driver into .venv, or update the driver." >&2
        exit 1
    fi
fi
