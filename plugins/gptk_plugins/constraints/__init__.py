"""Constrained decoding: the new text is always the beginning of a valid text."""
