#!/usr/bin/env bash
# Full fine-tuning on prompt and response columns: GSM8K as verl's preprocessing writes it, one dict a row in the
# column extra_info.
#   examples/full_sft.sh 8 checkpoints/gsm8k optim.lr=5e-6
set -euo pipefail
nproc_per_node=${1:?usage: full_sft.sh PROCESSES FOLDER [key=value ...]}
folder=${2:?usage: full_sft.sh PROCESSES FOLDER [key=value ...]}
shift 2

torchrun --standalone --nproc_per_node="$nproc_per_node" -m fsdpsft.train \
    data.train_files="$HOME/data/gsm8k/train.parquet" \
    data.val_files="$HOME/data/gsm8k/test.parquet" \
    data.prompt_key=extra_info \
    data.response_key=extra_info \
    data.prompt_dict_keys="['question']" \
    +data.response_dict_keys="['answer']" \
    data.micro_batch_size=4 \
    optim.lr=1e-4 \
    model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct \
    ulysses_sequence_parallel_size=2 \
    use_remove_padding=true \
    trainer.default_local_dir="$folder" \
    trainer.project_name=gsm8k-sft \
    trainer.experiment_name=gsm8k-sft-qwen-2.5-0.5b-instruct \
    trainer.total_epochs=4 \
    trainer.logger="['console']" \
    "$@"
