"""The command line: flags become calls, and what these return is printed. No logic."""
