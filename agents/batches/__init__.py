"""Where a batch comes from: its problems, the weights that write it, what is stored or worked out beside it."""
