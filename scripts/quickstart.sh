#!/usr/bin/env bash
# From nothing to a merged, fine-tuned model: about a minute on 2 CPU cores after installation.
# Fine-tunes the shipped tiny Llama with QLoRA, shows it before and after, merges, checks the merge.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh
echo "== installing into .venv"
setup_env

run=runs/quickstart
rm -rf "$run" "$run.before.json"

echo "== the base model, before"
qlora evaluate exact_match=20 output=$run.before.json

echo "== QLoRA fine-tuning"
qlora finetune experiment=demo_qlora output_dir=$run

echo "== base + adapter, after"
qlora evaluate adapter.path=$run/adapter exact_match=20 output=$run/after.json
mv $run.before.json $run/before.json

echo "== merging the adapter into the weights, and checking the merged model"
qlora merge adapter.path=$run/adapter output_dir=$run/merged dtype=float32
qlora evaluate checkpoint.dir=$run/merged exact_match=20 output=$run/merged.json

python scripts/quickstart_summary.py $run
