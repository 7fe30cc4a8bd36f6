"""Colors and markers of the lines of a plot."""

COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#808080")
"""Okabe and Ito's colors, which color-blind readers can distinguish."""

MARKERS = "osD^vPX*"
