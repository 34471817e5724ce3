"""Corpora: how they are named, loaded and cut into batches."""
