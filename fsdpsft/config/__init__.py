"""The settings: one schema, its rules, and the way from the command line to typed dataclasses."""
