"""Throughput of the fused layer against everything it replaces: ``pytest bench``."""
