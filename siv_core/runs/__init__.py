"""A run from its recipe to its last picture and back: start, resume, load, what it records, what a check says before."""
