#!/usr/bin/env bash
# ChatGLM3-6B, P-Tuning v1: 16 embeddings in front of the text learn, through an LSTM and an MLP, and are saved.
# One card. Not measured yet: what LoRA takes, and the encoder with its optimizer (235 M parameters that learn).
# --learning_rate is left out: the default of version 1 is 1e-3.
#
#   bash run_scripts/glm3_ptuning_v1_1card.sh [more flags; of one given twice the last counts]
set -euo pipefail
cd "$(dirname "$0")/.."

CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" deepspeed --master_port "${MASTER_PORT:-29500}" train.py \
    --mode glm3 --train_type ptuning --ptuning_version 1 --pre_seq_len 16 --prefix_projection True \
    --model_name_or_path ChatGLM3-6B/ --train_path data/spo_0.json --output_dir ./output-glm3-ptuning-v1 \
    --max_len 1560 --max_src_len 1024 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 \
    --weight_decay 0.1 --warmup_ratio 0.1 --num_train_epochs 2 --seed 1234 \
    --ds_file ds_zero2_no_offload.json --gradient_checkpointing --show_loss_step 10 \
    "$@"
