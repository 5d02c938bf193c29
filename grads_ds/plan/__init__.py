"""What a run will need, before any GPU is rented: memory of a rank, bytes on the wire, hours.

shapes -> states + activations -> traffic -> hours; `grads-ds plan` prints them. Everything about a
model is read from its own code on the meta device, without weights.
"""
