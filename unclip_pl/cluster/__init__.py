"""Runs over many processes and nodes: start-up check, preemption, watchdog, sharded training."""
