#!/usr/bin/env bash
# bash benchmarks/train.sh RUN TEXT TOKENIZER [STEPS]: the published shape on one text, as far as STEPS (5000), and proof
# of what is there. The same line again goes on where the run stands, to the bit; with STEPS 5050 fifty steps further.
set -euo pipefail
smolforge train shakespeare --run "$1" --data.sources "$2" --tokenizer "$3" --train.steps "${4:-5000}"
smolforge verify "$1" --out "$1/verify.json"
