"""What a model answers to problem sets: written by our engine or a server, judged, kept as it comes, counted."""
