"""What moenas does on a GPU: one module for each group of figures; `run.py` is the command."""
