"""All that is stored, in SQL and beside it: studies, trials, fronts, leases and weights."""
