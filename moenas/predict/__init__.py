"""Predictions from finished evaluations: features of architectures and surrogates of objectives."""
