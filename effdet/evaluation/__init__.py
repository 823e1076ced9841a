"""Pascal VOC and OpenImages evaluation, which is not available yet.

`effdet.evaluator.CocoEvaluator` gives AP at IoU 0.5 (the Pascal metric, up to its interpolation) as
`stats["AP50"]`.
"""
