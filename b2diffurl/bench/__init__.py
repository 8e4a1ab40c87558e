"""How fast and how exact a preset is on a machine, and what a first run on a GPU would meet."""
