"""What all parts are made of: linear maps, norms and activations."""
