"""A trained candidate as PyTorch source, as a Hugging Face model, or as a traced program."""
