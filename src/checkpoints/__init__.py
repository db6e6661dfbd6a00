"""Where a run starts, and how it is saved and read."""
