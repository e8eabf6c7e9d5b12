#!/usr/bin/env bash
# ChatGLM-6B, the official P-Tuning v2 recipe for short texts: a prefix of 128 tokens without an MLP, 3,000 steps of 16.
# One card. Not measured yet: little learns and the texts are short.
# The recipe was made for AdvertiseGen, whose files are read as they are: append --train_path AdvertiseGen/train.json.
# 131 tokens: 64 of the question, 64 of the answer and 3 special ones.
#
#   bash run_scripts/glm_ptuning_official_1card.sh [more flags; of one given twice the last counts]
set -euo pipefail
cd "$(dirname "$0")/.."

CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" deepspeed --master_port "${MASTER_PORT:-29500}" train.py \
    --mode glm --train_type ptuning --pre_seq_len 128 --prefix_projection False \
    --model_name_or_path ChatGLM-6B/ --train_path data/spo_0.json --output_dir ./output-glm-ptuning-official \
    --max_len 131 --max_src_len 64 --per_device_train_batch_size 1 --gradient_accumulation_steps 16 \
    --learning_rate 2e-2 --lr_scheduler linear --warmup_ratio 0 --min_lr_ratio 0 --weight_decay 0 --seed 42 \
    --max_steps 3000 --save_model_step 1000 --ds_file ds_zero2_no_offload.json --show_loss_step 10 \
    "$@"
