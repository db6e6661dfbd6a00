"""Errors, progress bars, processes and storage for all folders. Imports nothing from the other folders of `src`."""
