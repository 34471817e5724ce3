"""The user's file: an architecture with holes, requirements, objectives and settings."""
