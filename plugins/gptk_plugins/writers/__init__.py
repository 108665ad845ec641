"""The built-in weight writers: each writes a GPT to a directory in a format."""
