"""`python -m unclip_pl` is `lightning`, also where another package's script of that name comes first on the path."""

import sys

from unclip_pl.cli.lightning import main

if __name__ == "__main__":
    sys.exit(main())
