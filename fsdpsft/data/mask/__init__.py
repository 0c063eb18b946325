"""From conversations to token ids and a proven loss mask."""
