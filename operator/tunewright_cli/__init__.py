"""The command line: validate, plan, convert, run, watch and fetch."""
