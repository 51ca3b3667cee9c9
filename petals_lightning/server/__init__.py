"""A server: holds a span of frozen blocks and runs them, forward and backward, for clients of the swarm."""
