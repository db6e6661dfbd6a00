"""Chooses the checkpoint that a run starts from, saves checkpoints, and reads them."""
