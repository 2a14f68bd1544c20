"""PEFT adapter directories, in and out."""
