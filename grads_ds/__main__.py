"""`python -m grads_ds` and `deepspeed --module grads_ds <stage> CONFIG`."""

from __future__ import annotations

import sys

from grads_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
