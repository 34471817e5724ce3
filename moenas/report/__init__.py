"""Reports from stored rows: text, tables and figures."""
