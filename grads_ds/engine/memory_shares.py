"""What this project allows itself of a device's memory: for the runs and for what is planned."""

from __future__ import annotations

USABLE = 0.92  # the rest is the device's context, NCCL and fragmentation
PARAMETERS = 0.5  # of what is free: a rank's share of frozen parameters kept within its host
LARGEST = 65536  # tokens of a micro-batch; what more would save is not worth its memory
