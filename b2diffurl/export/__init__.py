"""Taking a LoRA elsewhere: in kohya's form, with a model card, to the hub."""
