"""Errors, progress bars, processes and storage: what more than one room needs. Imports nothing of ours."""
