"""Configurations of Hugging Face, read as architectures of a space file."""
