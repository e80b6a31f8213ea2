"""`smolforge inspect`."""
