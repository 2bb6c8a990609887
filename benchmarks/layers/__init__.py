"""What skipping costs on a given model: a bench that measures layer subsets, and its tables."""
