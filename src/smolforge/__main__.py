"""`python -m smolforge`."""

from smolforge.cli import main

main()
