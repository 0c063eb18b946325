"""What stands beside training: check, plan, self-test, export, and what they print and draw."""
