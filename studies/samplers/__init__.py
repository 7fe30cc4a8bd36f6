"""The study of samplers: how accurate each is at each number of evaluations."""
