"""What storage.py keeps: volumes as they come, artifacts as they go, weights."""
