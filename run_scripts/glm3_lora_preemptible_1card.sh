#!/usr/bin/env bash
# ChatGLM3-6B, LoRA on a card that may be taken away: asked to stop it saves, started again it goes on.
# One card with 24 GB, as glm3_lora_1card.sh.
# SIGTERM or SIGUSR1 to this script is passed on to the training: it finishes its step, saves, and exits with 75, which
# means "saved, resume me". So does this script, for its scheduler to start it again. When the training was asked and
# this script was not, it starts the training again itself.
#
#   bash run_scripts/glm3_lora_preemptible_1card.sh [more flags; of one given twice the last counts]
set -euo pipefail
cd "$(dirname "$0")/.."

stopping="" launcher="" code=75
pass_on() { # to the ranks: the launcher would give them 30 seconds, and exit with a code of its own
    stopping=1
    pkill -P "$(pgrep -d, -P "$launcher")" || pkill -P "$launcher" || kill "$launcher" || true
} 2>/dev/null
trap pass_on TERM USR1

while [ "$code" = 75 ] && [ -z "$stopping" ]; do
    CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" deepspeed --master_port "${MASTER_PORT:-29500}" train.py \
        --mode glm3 --train_type lora --lora_dim 16 --lora_alpha 64 --lora_dropout 0.1 \
        --lora_module_name "query_key_value,dense_h_to_4h,dense_4h_to_h,dense" \
        --model_name_or_path ChatGLM3-6B/ --train_path data/spo_0.json --output_dir ./output-glm3-preemptible \
        --max_len 1560 --max_src_len 1024 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 \
        --learning_rate 1e-4 --weight_decay 0.1 --warmup_ratio 0.1 --num_train_epochs 2 --seed 1234 \
        --ds_file ds_zero2_no_offload.json --gradient_checkpointing --show_loss_step 10 \
        --save_model_step 200 --save_total_limit 2 --resume auto \
        "$@" &
    launcher=$!
    while code=0; wait "$launcher" || code=$?; kill -0 "$launcher" 2>/dev/null; do :; done # a signal ends wait early
done
exit "$code"
