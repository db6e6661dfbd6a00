"""Which settings there are, what they mean, and what does not go together."""
