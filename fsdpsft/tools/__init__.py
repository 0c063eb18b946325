"""The tools: check, plan, self-test, export, convert, and what they print and draw."""
