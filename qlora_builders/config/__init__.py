"""Configs: typed schema, hydra composition, allow-listed components, entry point of the recipes."""
