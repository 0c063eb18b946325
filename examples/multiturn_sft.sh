#!/usr/bin/env bash
# Conversations: rows with a list of messages (role, content, optionally tool_calls) and, optionally, a column of tools.
# Every assistant turn is trained, up to and including the token that ends it; nothing else is.
#   examples/multiturn_sft.sh 8 checkpoints/chats data.train_files=chats.parquet
set -euo pipefail
nproc_per_node=${1:?usage: multiturn_sft.sh PROCESSES FOLDER [key=value ...]}
folder=${2:?usage: multiturn_sft.sh PROCESSES FOLDER [key=value ...]}
shift 2

torchrun --standalone --nproc_per_node="$nproc_per_node" -m fsdpsft.train \
    data.train_files="$HOME/data/multiturn/train.parquet" \
    data.val_files="$HOME/data/multiturn/test.parquet" \
    data.multiturn.enable=true \
    data.multiturn.messages_key=messages \
    data.max_length=2048 \
    data.truncation=drop \
    model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct \
    trainer.default_local_dir="$folder" \
    trainer.project_name=multiturn-sft \
    trainer.experiment_name=multiturn-sft-qwen-2.5-0.5b-instruct \
    trainer.logger="['console']" \
    "$@"
