"""Tests of the Triton backend. Those named test_interpreted_* run kernels in Triton's interpreter, on the CPU: they are
collected only in a process that was started with TRITON_INTERPRET=1, which test_triton_interpreter.py does."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # kernel_cases, also where only files of this folder run
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The two kinds exclude each other: a kernel is decorated once, for the interpreter or for the compiler.
collect_ignore_glob = ["test_triton_*.py"] if INTERPRETED else ["test_interpreted_*.py"]
