"""Reads shards: checks each of them, and gives one order of samples on any number of devices."""
