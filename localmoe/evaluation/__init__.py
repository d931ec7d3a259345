"""How good a model's numbers are: perplexity of a text, divergence from saved logits, agreement with transformers."""
