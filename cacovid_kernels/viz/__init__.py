"""Pictures of a selection: a contact sheet, and a page to explore in a browser. Needs Pillow."""

from cacovid_kernels.viz.colours import heat_colours
from cacovid_kernels.viz.page import report
from cacovid_kernels.viz.sheet import plot_selection

__all__ = ["heat_colours", "plot_selection", "report"]
