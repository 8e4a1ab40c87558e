"""The steps of a stage, each complete or not at all, and the loop over the stages."""
