"""The command line: validate, plan, run, watch and fetch."""
