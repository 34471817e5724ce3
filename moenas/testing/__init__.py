"""Contract tests for users' files: components, objectives, figures and corpora."""
