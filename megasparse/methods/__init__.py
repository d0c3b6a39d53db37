"""Ways to train for less: training methods, and the hooks by which they and other callbacks take part in a run."""
