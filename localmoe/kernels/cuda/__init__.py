"""The place of the cuda device; there is none yet."""
