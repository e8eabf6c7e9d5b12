#!/usr/bin/env bash
# ChatGLM-6B, ptuning: P-Tuning v2, a prefix of 16 tokens through an MLP learns and is saved.
# One card with 48 GB. It took 43 GB in ChatGLM-Finetuning (A40).
# The original's --learning_rate 1e-4 is left out: without the flag the train type's own default holds.
# The encoder of ChatGLM-6B's prefix has 0.96 billion parameters in fp32: hence the shorter lengths on one card.
#
#   bash run_scripts/glm_ptuning_1card.sh [more flags; of one given twice the last counts]
set -euo pipefail
cd "$(dirname "$0")/.."

CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" deepspeed --master_port "${MASTER_PORT:-29500}" train.py \
    --mode glm --train_type ptuning --pre_seq_len 16 --prefix_projection True \
    --model_name_or_path ChatGLM-6B/ --train_path data/spo_0.json --output_dir ./output-glm \
    --max_len 768 --max_src_len 512 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 \
    --weight_decay 0.1 --warmup_ratio 0.1 --num_train_epochs 2 --seed 1234 \
    --ds_file ds_zero2_no_offload.json --gradient_checkpointing --show_loss_step 10 \
    "$@"
