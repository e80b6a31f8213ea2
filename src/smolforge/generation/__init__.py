"""Samplers as values, and one stream of tokens that everything which talks reads."""
