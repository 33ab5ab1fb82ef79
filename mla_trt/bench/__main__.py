"""`python -m mla_trt.bench kernels`: for machines without the packages that the command needs."""

import sys

from mla_trt.bench.kernels import main

sys.exit(main())
