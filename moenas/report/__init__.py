"""What is read from stored rows: text, tables and figures."""
