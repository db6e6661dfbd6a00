"""Builds the parts of a run from the config, for Composer's Trainer, and describes the run."""
