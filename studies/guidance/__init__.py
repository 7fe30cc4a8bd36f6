"""What guidance does to the pictures of the embedded model, and what it costs."""
