#!/usr/bin/env bash
# ChatGLM-6B, lora: low-rank matrices learn, an adapter is saved.
# Four cards with 24 GB. It took 20 GB of each in ChatGLM-Finetuning (A40).
#
#   bash run_scripts/glm_lora_4cards.sh [more flags; of one given twice the last counts]
set -euo pipefail
cd "$(dirname "$0")/.."

CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0,1,2,3}" deepspeed --master_port "${MASTER_PORT:-29500}" train.py \
    --mode glm --train_type lora --lora_dim 16 --lora_alpha 64 --lora_dropout 0.1 \
    --lora_module_name "query_key_value" \
    --model_name_or_path ChatGLM-6B/ --train_path data/spo_0.json --output_dir ./output-glm \
    --max_len 1560 --max_src_len 1024 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 \
    --learning_rate 1e-4 --weight_decay 0.1 --warmup_ratio 0.1 --num_train_epochs 2 --seed 1234 \
    --ds_file ds_zero2_no_offload.json --gradient_checkpointing --show_loss_step 10 \
    "$@"
