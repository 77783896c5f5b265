"""What surrounds the job table: submissions, the dispatcher, upkeep."""
