"""Pascal VOC and OpenImages metrics on numpy arrays; boxes are (y1, x1, y2, x2).

Read `detection_evaluator` first. `effdet.evaluator` applies them to a data set.
"""
