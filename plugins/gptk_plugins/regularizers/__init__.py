"""The built-in regularizers, one in each file."""
