"""How shards reach a rank: whole, in one order."""
