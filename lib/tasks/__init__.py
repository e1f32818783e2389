"""The tasks: one file each. A task knows no config, no backend and no other task."""
