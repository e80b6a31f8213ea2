"""Runs side by side: what they measured, as figures."""
