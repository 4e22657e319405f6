"""What tests share: the oracle, ranks in one process, jobs that run on every rank."""
