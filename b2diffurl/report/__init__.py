"""What a run looks like: one HTML page, and its curves."""
