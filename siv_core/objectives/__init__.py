"""The objectives: each is data (`Objective`) over pure functions, one a phase. docs/math.md has the formulas side by side."""
