"""How well a model predicts a text, and how strategies compare."""
