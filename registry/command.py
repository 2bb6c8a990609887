"""What the commands share."""

INTERRUPTED = 130
"""The exit status of a command that was interrupted, as a shell gives it."""
