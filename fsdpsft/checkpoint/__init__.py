"""Weights and states in files: safetensors, export, resumable state, the run's folder."""
