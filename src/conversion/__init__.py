"""How files of documents become shards: wholly or not at all."""
