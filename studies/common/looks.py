"""How the lines of a plot are told apart."""

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#808080")
"""Okabe and Ito's, which the colour-blind can tell apart."""

MARKERS = "osD^vPX*"
