"""Weight writers: from a GPT to a directory in some format."""
