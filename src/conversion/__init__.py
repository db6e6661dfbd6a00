"""Converts files of documents into shards. Each file is converted completely, or nothing of it is kept."""
