"""Processes: mesh, FSDP2, Ulysses, activation checkpointing. Knows nothing of any model."""
