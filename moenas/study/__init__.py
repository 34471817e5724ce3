"""A study from its launch to its end: the driver, its stop rules, repairs and results."""
