"""Images as AUTOMATIC1111's clients ask for them."""
