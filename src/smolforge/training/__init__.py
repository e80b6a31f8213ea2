"""One training step and the loop."""
