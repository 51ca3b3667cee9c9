"""Inference sessions: the keys and values of each, and decoding steps that run as one batch."""
