"""A trained candidate as a folder of PyTorch source, weights and a README, free of moenas."""
