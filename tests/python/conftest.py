"""Settings of the Python tests that must be made before OpenMP starts."""

import os

# Tests make thousands of tiny parallel regions; threads that spin between them starve each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
