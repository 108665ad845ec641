"""The built-in LR schedulers, one per file."""
