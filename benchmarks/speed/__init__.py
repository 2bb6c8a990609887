"""Who writes completions how fast: our engine, its peers, and the limits of the machine."""
