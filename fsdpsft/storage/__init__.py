"""Files that are whole or absent: checksummed, fsynced, renamed into place; and tensors spread over ranks."""
