"""The experiments of the ARL paper and three small ones: ``python -m experiments.run --help``.

Not a part of the installed package: run them from a checkout. What each command should give, and what has
been run: docs/reproduce.md.
"""
