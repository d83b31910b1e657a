"""`python -m unclip_pl` is `lightning`, where another package's script of that name comes first."""

import sys

from unclip_pl.cli.lightning import main

if __name__ == "__main__":
    sys.exit(main())
