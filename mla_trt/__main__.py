"""`python -m mla_trt` is the command `mla-trt`."""

import sys

from mla_trt.cli import main

sys.exit(main())
