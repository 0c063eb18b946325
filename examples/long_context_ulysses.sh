#!/usr/bin/env bash
# Long conversations: each sequence is shared by 4 processes (Ulysses), so that a token budget of 128k is 32k a device.
# The number of processes is a multiple of 4; losses and weights are those of one process.
#   examples/long_context_ulysses.sh 8 checkpoints/long data.train_files=long.parquet
set -euo pipefail
nproc_per_node=${1:?usage: long_context_ulysses.sh PROCESSES FOLDER [key=value ...]}
folder=${2:?usage: long_context_ulysses.sh PROCESSES FOLDER [key=value ...]}
shift 2

torchrun --standalone --nproc_per_node="$nproc_per_node" -m fsdpsft.train \
    data.train_files="$HOME/data/long/train.parquet" \
    data.multiturn.enable=true \
    data.max_length=131072 \
    data.max_token_len_per_gpu=131072 \
    data.train_batch_size=32 \
    data.truncation=drop \
    model.partial_pretrain=Qwen/Qwen2.5-7B-Instruct \
    model.enable_gradient_checkpointing=full \
    ulysses_sequence_parallel_size=4 \
    use_remove_padding=true \
    trainer.default_local_dir="$folder" \
    trainer.logger="['console']" \
    "$@"
