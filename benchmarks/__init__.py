"""Measurements of speed and memory; see README.md of this folder."""
