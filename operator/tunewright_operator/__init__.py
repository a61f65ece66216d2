"""The operator: watches FineTuneJobs and runs them as Jobs."""
