"""Triton kernels on Triton's interpreter, which is chosen before the first import: a pytest run of its own.

``TRITON_INTERPRET=1 pytest tests/triton`` (``make test`` does it). In any other run these tests are not collected.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
