"""One training run: engine, DeepSpeed configuration, optimizer, guard, log, checkpoints, resuming."""
