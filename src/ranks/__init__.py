"""How processes meet, agree, stop and fail together."""
