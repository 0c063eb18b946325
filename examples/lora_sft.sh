#!/usr/bin/env bash
# LoRA: the folder holds the merged model, each global_step_N/lora_adapter the PEFT adapter.
#   examples/lora_sft.sh 8 checkpoints/gsm8k-lora
set -euo pipefail
exec "$(dirname "$0")/full_sft.sh" "$@" \
    model.lora_rank=32 \
    model.lora_alpha=16 \
    model.target_modules=all-linear \
    optim.lr=1e-4
