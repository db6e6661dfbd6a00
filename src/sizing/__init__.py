"""Estimates of a run: FLOPs, memory, devices, hours."""
