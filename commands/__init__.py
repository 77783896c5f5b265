"""What is started from a command line."""
