"""Turning what was trained into other folders: nothing here is needed for training."""
