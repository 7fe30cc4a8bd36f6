"""How good each sampler is at each number of evaluations, on the embedded model."""
