"""The built-in LR schedulers, one in each file."""
