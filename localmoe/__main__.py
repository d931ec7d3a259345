"""`python -m localmoe`: the same as the command `localmoe`."""

from __future__ import annotations

from localmoe.cli import main

if __name__ == "__main__":
    main()
