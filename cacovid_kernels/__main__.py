"""`python -m cacovid_kernels`."""

from __future__ import annotations

import sys

from cacovid_kernels.cli import main

sys.exit(main())
