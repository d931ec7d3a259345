"""From bytes on disk to named tensors and metadata; must not know any architecture."""
