"""The examples, with tiny budgets."""
