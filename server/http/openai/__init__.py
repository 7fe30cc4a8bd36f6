"""Images as OpenAI's clients ask for them."""
