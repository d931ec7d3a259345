"""Weights in other block formats: which tensor gets which, a folder in the form of a GGUF file, the encoding."""
