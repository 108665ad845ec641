"""`python -m gptk` is the program `gptk`."""

from gptk.cli import main

main()
