"""HTTP: one thin router a file."""
