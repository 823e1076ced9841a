"""``python -m bench floors``: the roofline of whole models, from the layers that the models themselves run.

`trace` records one forward pass as steps, `decompose` says which steps an op is made of, `fusion` puts steps together
to launches, `model` adds them up. There is no table of shapes.
"""

from bench.floors.command import add_arguments, run
from bench.floors.fusion import FUSIONS, Launch
from bench.floors.model import Floors, floors, floors_of

__all__ = ["FUSIONS", "Floors", "Launch", "add_arguments", "floors", "floors_of", "run"]
