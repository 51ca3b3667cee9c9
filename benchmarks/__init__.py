"""Commands that measure; docs/performance.md has what they found."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve the servers
