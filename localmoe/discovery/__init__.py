"""The models on this machine: where they lie, what they are called, what they are; writes nothing."""
