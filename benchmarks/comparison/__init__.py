"""Many runs: which, when and where they run, and what their outcomes say. How that is shown belongs to ``report``."""
