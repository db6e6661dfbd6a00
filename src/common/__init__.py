"""Errors, progress bars, processes and storage: what every room needs. Imports nothing of ours."""
