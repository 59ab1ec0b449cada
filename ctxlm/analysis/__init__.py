"""What the runs of a grid say: power laws, crossover, over-fitting, and the report."""
