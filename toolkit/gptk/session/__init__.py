"""The decode session: a model, its cache and rows, moved by four verbs."""
