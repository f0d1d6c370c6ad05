"""`python -m orepa_compiler`: the same as the program `orepa`."""

from __future__ import annotations

import sys

from orepa_compiler.cli import main

if __name__ == "__main__":
    sys.exit(main())
