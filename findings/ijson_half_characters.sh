#!/usr/bin/env bash
# ijson 3.6.0: which value a JSON file has depends on the backend that the wheel brought along. A \ud83d without its second half
# (a character cut in two, as crawlers leave it in data sets) is valid JSON. json.loads and ijson's python backend keep it, so
# that writing the text as UTF-8 fails and the row can be named; yajl2_c, which `import ijson` takes where it can, hands on
# "?" instead: the text reads well and is another one. With use_float=True (floats as json has them, not Decimal) an integer
# above 64 bits is an IncompleteJSONError there, though the document is complete.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ijson==3.6.0
cat >"$folder/read.py" <<'PY'
import io
import json

import ijson


def first(backend, text):
    try:
        return ascii(next(ijson.get_backend(backend).items(io.BytesIO(text), "item", use_float=True)))
    except ijson.JSONError as error:
        return type(error).__name__


for text in (rb'["water \ud83d"]', b"[18446744073709551616]"):
    print("RESULT", ascii(json.loads(text)[0]), first("python", text), first("yajl2_c", text))
print("RESULT", ijson.backend)
PY
"$folder/venv/bin/python" "$folder/read.py" | grep RESULT | tee "$folder/found"
diff - "$folder/found" <<'TXT' && echo "as stated"
RESULT 'water \ud83d' 'water \ud83d' 'water ?'
RESULT 18446744073709551616 18446744073709551616 IncompleteJSONError
RESULT yajl2_c
TXT
