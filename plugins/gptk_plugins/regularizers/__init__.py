"""The built-in regularizers, one per file."""
