"""The Optuna dashboard with the notes and figures of moenas."""
