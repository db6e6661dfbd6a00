"""Checkpoints: which one a run starts from, how a run saves them, and how programs read them."""
