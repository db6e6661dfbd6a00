"""What looks into a running training: figures, guard, stop, profiling, loggers.

The names that a YAML gives them are in src/training/plugins.py.
"""
