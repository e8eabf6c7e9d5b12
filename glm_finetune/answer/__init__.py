"""Asking a model: nothing here is needed for training."""
