"""What a run looks like: curves after every stage, one HTML page."""
