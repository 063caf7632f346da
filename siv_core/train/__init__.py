"""Training: the loop, the step and its phases, the schedule of stages, players and shadows, statistics and health."""
