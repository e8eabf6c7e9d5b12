"""Scores of answers: nothing here is needed for training."""
