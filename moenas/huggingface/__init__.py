"""Configurations of Hugging Face, read as architectures of a space file, and written from them."""
