#!/usr/bin/env bash
# From nothing to searched pictures on a machine with Python 3.11: installs, prepares OpenMoji and two
# pretrained towers, trains the three variants at CPU size, encodes with the best, benchmarks, searches.
# What exists is reused. TWOTOWER_OPENAI_WEIGHTS=ViT-B-32.pt fine-tunes OpenAI's own weights instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
start=$SECONDS
step() { printf '\n== %s (%d s)\n' "$1" "$((SECONDS - start))"; }

step "install into .venv"
bash scripts/0_install.sh
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
use_environment

step "prepare OpenMoji and the pretrained towers"
twotower prepare data=openmoji
twotower prepare backbones

step "bert_resnet: heads on pretrained MiniLM and EfficientNet-Lite0"
twotower train experiment=quickstart_bert_resnet

step "openai_pretrain: a tiny CLIP from scratch"
twotower train experiment=quickstart_openai_pretrain
pretrained=quickstart-openai_pretrain
if [ ! -e logs/$pretrained/evaluate/openmoji-train-175.json ]; then
  twotower evaluate run.name=$pretrained evaluate.split=train evaluate.max_images=175
fi

step "openai_finetune: fine-tuning in OpenAI's format"
given=${TWOTOWER_OPENAI_WEIGHTS:-}
cached=$HOME/.cache/clip/ViT-B-32.pt
if [ -n "$given" ] && [ ! -f "$given" ]; then
  echo "TWOTOWER_OPENAI_WEIGHTS=$given: there is no such file" >&2
  exit 1
elif [ -n "$given" ] || [ -f "$cached" ]; then
  weights=${given:-$cached}
  echo "starting from OpenAI's weights in $weights; one epoch, which takes minutes on a CPU"
  settings=("run.name=quickstart-openai_finetune-$(basename "$weights" .pt)" train.epochs=1)
else
  weights=models/$pretrained/openai.pt
  settings=(train.overwrite=false)
  echo "OpenAI's weights are not at hand, so it starts from openai_pretrain's export, $weights"
  if [ ! -e "$weights" ] || [ "models/$pretrained/best.safetensors" -nt "$weights" ]; then
    twotower export checkpoint=models/$pretrained/best.safetensors path="$weights"
    settings=(train.overwrite=true)
  fi
fi
twotower train experiment=quickstart_openai_finetune model.weights="$weights" "${settings[@]}"

step "which variant wins"
twotower compare
checkpoint=$(python -c 'import json; print(json.load(open("logs/comparison.json"))["best"]["openmoji/val"])')
best=$(basename "$(dirname "$checkpoint")")

step "encode every picture with the best: $best"
twotower encode run.name="$best"

step "benchmark the exact index against FAISS"
if [ ! -e "logs/$best/benchmark/benchmark.md" ]; then
  twotower benchmark run.name="$best"
fi
cat "logs/$best/benchmark/benchmark.md"

step "search"
printf '%s\n' "a cat with tears of joy" "something sweet to eat" "bad weather" |
  twotower search run.name="$best" search.k=10

step "done"
cat logs/comparison.md
echo
echo "pictures found:  logs/$best/search/"
echo "benchmark plot:  logs/$best/benchmark/benchmark.png"
echo "training curves: .venv/bin/tensorboard --logdir logs"
