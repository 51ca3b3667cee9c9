"""When a request runs: one compute thread, and a queue that is fair between clients."""
