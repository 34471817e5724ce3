"""The HTTP service: its API, queue, access control, pages and client."""
