"""The graph passes, in the order in which they run."""
