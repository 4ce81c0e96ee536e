"""All right criterions, in many styles."""

from __future__ import annotations

from . import right_classic, right_closures, right_dino, right_double, right_pair, right_solvers
from .port import Deformable, Detr, Grounding, Right, deformable_factory, detr_factory, grounding_factory

D, F, G = "detr", "deformable-detr", "grounding-dino"
NOT_TENSORS = "MATCH-6 asks for tensors; what scipy hands out indexes as well"

RIGHT: list[Right] = [
    Right("detr/port", D, detr_factory(Detr), should=True),
    Right("detr/classic", D, right_classic.build_criterion),
    Right("detr/pair", D, right_pair._assemble, module="right_pair"),
    Right("detr/double", D, right_double.build_detr),
    Right("detr/closure", D, right_closures.build_detr),
    Right("detr/sorted-by-label", D, right_solvers.build_sorted_by_label),
    Right("detr/list-matcher", D, right_solvers.build_list_matcher, note=NOT_TENSORS, should=True),
    Right("deformable-detr/port", F, deformable_factory(Deformable), should=True),
    Right("deformable-detr/classic", F, right_classic.build_deformable),
    Right("deformable-detr/double", F, right_double.build_deformable),
    Right("deformable-detr/closure", F, right_closures.build_deformable),
    Right("deformable-detr/volgenant", F, right_solvers.build_volgenant, should=True),
    Right("deformable-detr/array-matcher", F, right_solvers.build_array_matcher, note=NOT_TENSORS, should=True),
    Right("deformable-detr/padded", F, right_solvers.build_padded),
    Right("deformable-detr/at-once", F, right_solvers.build_at_once, should=True),
    Right("deformable-detr/few-options", F, right_solvers.build_few_options),
    Right("grounding-dino/port", G, grounding_factory(Grounding), should=True),
    Right("grounding-dino/double", G, right_double.build_grounding),
    Right("grounding-dino/closure", G, right_closures.build_grounding),
    Right("grounding-dino/warm-start", G, right_solvers.build_warm_start, should=True),
    Right("grounding-dino/sorted-by-area", G, right_solvers.build_sorted_by_area, should=True),
    Right("grounding-dino/concatenated", G, right_solvers.build_concatenated),
    Right("grounding-dino/logging", G, right_solvers.build_logging, should=True),
    Right("grounding-dino/whatever", G, right_solvers.build_whatever),
    Right("dino/published", "dino", right_dino.build_criterion),
]
