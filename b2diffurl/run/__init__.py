"""Where and how a run works: settings, command line, folder, files, processes, lock, figures. No model."""
