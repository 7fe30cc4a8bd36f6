"""The study of guidance: its effect on images of the embedded model, and its cost."""
