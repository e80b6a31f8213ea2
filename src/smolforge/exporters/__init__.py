"""A model handed on: in the forms other programs read, each checked by a round trip."""
