"""The trainer in parts: construction, step, evaluation, checkpointing, loop, processes."""
