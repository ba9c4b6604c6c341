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

step "prepare OpenMoji and the pretrained towers"
twotower prepare data=openmoji
twotower prepare backbones

step "bert_resnet: heads on pretrained MiniLM and EfficientNet-Lite0"
twotower train experiment=quickstart_bert_resnet

step "openai_pretrain: a tiny CLIP from scratch"
twotower train experiment=quickstart_openai_pretrain
pretrained=models/quickstart-openai_pretrain
if [ ! -e logs/quickstart-openai_pretrain/evaluate/openmoji-train-175.json ]; then
  twotower evaluate experiment=quickstart_openai_pretrain checkpoint=$pretrained/best.safetensors \
    evaluate.split=train evaluate.max_images=175
fi

step "openai_finetune: fine-tuning in OpenAI's format"
weights=${TWOTOWER_OPENAI_WEIGHTS:-${XDG_CACHE_HOME:-$HOME/.cache}/twotower/openai/ViT-B-32.pt}
if [ -e "$weights" ]; then
  echo "starting from OpenAI's weights in $weights"
else
  weights=$pretrained/openai.pt
  echo "OpenAI's weights are not at hand, so it starts from openai_pretrain's export, $weights"
  if [ ! -e "$weights" ] || [ "$pretrained/best.safetensors" -nt "$weights" ]; then
    twotower export checkpoint=$pretrained/best.safetensors path="$weights"
  fi
fi
twotower train experiment=quickstart_openai_finetune model.weights="$weights"

step "which variant wins"
twotower compare
best=$(python -c 'import json; print(json.load(open("logs/comparison.json"))["best"]["openmoji/val"])')

step "encode every picture with the best: $best"
twotower encode checkpoint="$best"

step "benchmark the exact index against FAISS"
twotower benchmark checkpoint="$best"

step "search"
printf '%s\n' "a cat with tears of joy" "something sweet to eat" "bad weather" |
  twotower search checkpoint="$best" search.k=10

step "done"
cat logs/comparison.md
echo
echo "pictures found:  $(dirname "${best/models/logs}")/search/"
echo "benchmark plot:  $(dirname "${best/models/logs}")/benchmark/"
echo "training curves: .venv/bin/tensorboard --logdir logs"
