"""Feed-forward layers without a router."""
