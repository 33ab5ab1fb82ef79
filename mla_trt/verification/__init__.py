"""Whether a lowered model computes what its original does."""
