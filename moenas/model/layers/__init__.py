"""Small modules that all parts use: linear maps, norms and activations."""
