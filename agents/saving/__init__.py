"""Folders and files: checkpoints, configurations, the hub."""
