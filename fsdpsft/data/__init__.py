"""From files to batches, one direction; imports no process group."""
