"""Axolotl configurations as FineTuneJobs. `convert` is the way in; docs/axolotl.md has the table of keys."""
