"""Sequence mixers: attention of every shape, linear attention, state spaces and convolutions."""
