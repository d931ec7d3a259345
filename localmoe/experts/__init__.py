"""Residency: which experts are in memory, who brings them in, what makes room; the only owner of that subject."""
