"""Colours and markers of the lines of a plot."""

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#808080")
"""Okabe and Ito's colours, which colour-blind readers can distinguish."""

MARKERS = "osD^vPX*"
