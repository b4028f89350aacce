"""Each module measures dlref beside a peer in one run, and prints a table of ratios."""
