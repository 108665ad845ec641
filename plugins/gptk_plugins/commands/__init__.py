"""Commands that the built-in plug-ins add to `gptk`."""
