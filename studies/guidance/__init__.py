"""The study of guidance: what it does to images of the embedded model, and what it costs."""
