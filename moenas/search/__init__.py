"""What proposes the next trial: samplers, points of a finite space, and trials of Optuna."""
