"""The settings of a run: what they are, what they mean, and which combinations are impossible."""
