"""What a run tells of itself: ratios and their tails, metrics, warnings, and who writes them down."""
