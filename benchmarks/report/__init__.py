"""What a comparison says, as tables, pictures and pages. Nothing here computes a statistic."""
