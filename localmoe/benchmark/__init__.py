"""`localmoe bench`: what is measured, against which limits and which peer, and how it is told; prints nothing."""
