"""Whether the server is after a long time of unpleasant clients what it was before."""
