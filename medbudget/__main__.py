"""Run the command line: ``python -m medbudget``."""

from medbudget.cli import main

main()
