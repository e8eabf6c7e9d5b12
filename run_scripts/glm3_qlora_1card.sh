#!/usr/bin/env bash
# ChatGLM3-6B, QLoRA: low-rank matrices at every linear layer learn, beside a base in 4 bit; an adapter is saved.
# For a small card: the base takes about 4 GB instead of 12.5. Not measured on a card yet. Needs bitsandbytes.
# --learning_rate is left out: qlora's default is 2e-4, its paper's. On cards before Ampere append --precision fp16.
#
#   bash run_scripts/glm3_qlora_1card.sh [more flags; of one given twice the last counts]
set -euo pipefail
cd "$(dirname "$0")/.."

CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" deepspeed --master_port "${MASTER_PORT:-29500}" train.py \
    --mode glm3 --train_type qlora --lora_dim 16 --lora_alpha 64 --lora_dropout 0.1 --lora_module_name all-linear \
    --model_name_or_path ChatGLM3-6B/ --train_path data/spo_0.json --output_dir ./output-glm3-qlora \
    --max_len 1560 --max_src_len 1024 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 \
    --weight_decay 0.1 --warmup_ratio 0.1 --num_train_epochs 2 --seed 1234 \
    --ds_file ds_zero2_no_offload.json --precision bf16 --gradient_checkpointing --show_loss_step 10 \
    "$@"
