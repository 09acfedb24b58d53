"""The stages of `blockwise`: their commands, what they are worth, and their table."""
