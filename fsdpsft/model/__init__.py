"""The Hugging Face model: loading, attention, head, adapters. Knows nothing of processes."""
