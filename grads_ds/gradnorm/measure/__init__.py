"""What one micro-batch's forward and backward are read by: hooks, taps, and the sums they fill."""
