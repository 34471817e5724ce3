"""Contract tests for what people add: components, objectives, figures and corpora."""
