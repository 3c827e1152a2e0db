"""`python -m dailies.jobs.bench`, from a bare checkout; `dailies bench` is the same."""

import sys

from dailies.jobs.bench.command import main

sys.exit(main())
