"""What can be known before a run: memory, precision, what looks wrong."""
