"""`python -I -m tightwad_agent.engine.verifier FD`."""

from __future__ import annotations

import os
import sys

from tightwad_agent.engine.verifier.program import main

if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # libllama's threads and devices end with the process; taking them down in order can hang
