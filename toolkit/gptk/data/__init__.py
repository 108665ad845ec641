"""Texts as files of token ids, and windows on them."""
