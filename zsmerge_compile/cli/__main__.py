"""`python -m zsmerge_compile.cli`."""

import sys

from zsmerge_compile.cli import main

sys.exit(main())
