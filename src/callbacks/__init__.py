"""What looks into a running training: figures, guard, stop, profiling, loggers."""
