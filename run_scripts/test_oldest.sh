#!/usr/bin/env bash
# The quick tests with the oldest versions that are supported, in an environment of their own (.venv-oldest, some minutes and
# 6 GB the first time: this torch comes with CUDA). Arguments go to pytest: bash run_scripts/test_oldest.sh tests/test_models.py
set -euo pipefail
cd "$(dirname "$0")/.."

oldest=$(sed -n 's/^OLDEST = {\(.*\)}.*/\1/p' glm_finetune/__init__.py) # "torch": "2.11.0", "transformers": "5.17.0"
pins=$(tr ',' '\n' <<<"$oldest" | sed -E 's/ *"(.*)": "(.*)"/s|^\1==[^ ]+|\1==\2|;/')
wanted=$(sed -E "$pins" requirements.txt | cat - requirements-dev.txt)
if [ "$(cat .venv-oldest/installed.txt 2>/dev/null || true)" != "$wanted" ]; then
    echo "setting up .venv-oldest with $oldest"
    "${PYTHON:-python3}" -m venv --clear .venv-oldest
    sed -E "$pins" requirements.txt >.venv-oldest/requirements.txt
    .venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-oldest/requirements.txt -r requirements-dev.txt
    echo "$wanted" >.venv-oldest/installed.txt
fi
.venv-oldest/bin/python -m pytest -q -m "not slow" "${@:-tests}"
