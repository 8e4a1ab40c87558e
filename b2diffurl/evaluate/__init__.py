"""Before and after: the base model and a checkpoint on the same prompts with the same fixed noise."""
