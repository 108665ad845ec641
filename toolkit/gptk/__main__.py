"""`python -m gptk` is the program `gptk`."""

from gptk_command import main

main()
