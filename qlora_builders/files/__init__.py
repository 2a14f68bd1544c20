"""Files in general: written whole, read strictly; nothing about models."""
