#!/usr/bin/env bash
# ChatGLM3-6B, a variant of LoRA: VARIANT is dora (if it is not set), pissa or rslora. An adapter is saved.
# One card. Not measured yet: they take what LoRA takes, DoRA more.
# No dropout: PiSSA begins with the base's largest singular values, which it would disturb.
# The scale is alpha / rank = 2, as in DoRA's paper; rsLoRA's is alpha / sqrt(rank) = 8. PiSSA's paper has alpha = rank.
#
#   VARIANT=pissa bash run_scripts/glm3_lora_variant_1card.sh [more flags; of one given twice the last counts]
set -euo pipefail
cd "$(dirname "$0")/.."

VARIANT="${VARIANT:-dora}"
CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" deepspeed --master_port "${MASTER_PORT:-29500}" train.py \
    --mode glm3 --train_type lora --lora_variant "$VARIANT" --lora_dim 16 --lora_alpha 32 --lora_dropout 0 \
    --lora_module_name "query_key_value,dense_h_to_4h,dense_4h_to_h,dense" \
    --model_name_or_path ChatGLM3-6B/ --train_path data/spo_0.json --output_dir "./output-glm3-$VARIANT" \
    --max_len 1560 --max_src_len 1024 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 \
    --learning_rate 1e-4 --weight_decay 0.1 --warmup_ratio 0.1 --num_train_epochs 2 --seed 1234 \
    --ds_file ds_zero2_no_offload.json --gradient_checkpointing --show_loss_step 10 \
    "$@"
