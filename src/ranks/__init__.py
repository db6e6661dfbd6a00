"""Connects the ranks of a run, compares their settings, and makes all ranks stop and fail together."""
