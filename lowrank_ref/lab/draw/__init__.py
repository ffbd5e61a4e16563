"""What chapters show: charts, explorers, tables, and an equation beside its code.

    svg      charts and images as SVG             photo    one photograph at every rank
    plots    colours and helpers for matplotlib   table    text and HTML tables
    explore  figures with sliders, no kernel      source   an equation beside its code
    palette  one colour a method

`plots` is used as a module: `from lowrank_ref.lab.draw import plots`.
"""

from lowrank_ref.lab.draw.explore import explore
from lowrank_ref.lab.draw.palette import colour
from lowrank_ref.lab.draw.photo import PhotoExplorer, explore_photo
from lowrank_ref.lab.draw.source import beside, source
from lowrank_ref.lab.draw.svg import PALETTE, bar_chart, image, line_chart, readout
from lowrank_ref.lab.draw.table import Table

__all__ = [
    "PALETTE",
    "PhotoExplorer",
    "Table",
    "bar_chart",
    "beside",
    "colour",
    "explore",
    "explore_photo",
    "image",
    "line_chart",
    "readout",
    "source",
]
