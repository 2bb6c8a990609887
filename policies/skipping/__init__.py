"""Which layers a rollout skips, what that costs, and what the layers kept do to make up for it."""
