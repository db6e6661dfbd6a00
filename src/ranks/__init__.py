"""How the processes of a run connect, compare their settings, stop and fail together."""
