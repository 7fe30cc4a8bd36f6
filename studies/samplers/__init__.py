"""The study of samplers: the accuracy of each at each number of evaluations."""
