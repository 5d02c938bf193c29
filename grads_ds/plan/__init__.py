"""What a run will need, before any GPU is rented: memory of a rank, bytes on the wire, hours.

shapes -> timeline -> memory, traffic -> stage_time -> forecast; `grads-ds plan` prints it.
Everything about a model is read from its own code on the meta device, without weights.
"""
