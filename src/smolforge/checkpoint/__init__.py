"""A directory <-> a model and its training state; whole or not at all."""
