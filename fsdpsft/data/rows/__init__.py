"""From files to conversations: sources, formats, messages."""
