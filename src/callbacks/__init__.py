"""Callbacks, algorithms and loggers of a run: figures, the guard against NaN, the stop that saves, profiling.

The names that a YAML gives them are in src/training/plugins.py.
"""
