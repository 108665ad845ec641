"""Records of results: all that repeats a run, written by `--json`, and repeating it."""
