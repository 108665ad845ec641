"""Loading a checkpoint, building a model from it, and saving one."""
