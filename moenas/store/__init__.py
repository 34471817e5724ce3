"""What stands in SQL and beside it: studies, trials, evaluations, fronts, leases and weights."""
