"""The operator: reconciles FineTuneJobs and ModelEndpoints."""
