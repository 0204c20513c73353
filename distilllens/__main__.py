"""``python -m distilllens``: the same as the command ``distilllens``."""

from distilllens.cli import main

main()
