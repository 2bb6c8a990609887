"""The exact estimator lab: bias, variance, direction and ascent efficiency of every registered correction, by
enumeration, with the production code. Command line: ``python -m benchmarks.estimators --help``."""
