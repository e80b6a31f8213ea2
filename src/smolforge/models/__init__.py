"""Neural networks: the decoder and its parts."""
