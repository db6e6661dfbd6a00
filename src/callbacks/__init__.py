"""Callbacks, algorithms and loggers of a run: metrics, skipping NaN batches, saving before a stop, profiling.

The names that a YAML gives them are in src/training/plugins.py.
"""
