"""The place of the wgpu device; there is none yet."""
