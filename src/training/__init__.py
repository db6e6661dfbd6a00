"""What is built from the config and handed to the Trainer."""
