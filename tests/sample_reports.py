"""Reports made by hand, so that what is written of them does not hang on what the suite finds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from detr_conformance.findings import Call, Diagnosis, Evidence, Finding, Gradient, Numbers, Report
from detr_fixtures import arrays

HOSTILE = "</pre><script>alert(1)</script>`|<img src=x onerror=alert(2)> \x1b[31m\ud800 &amp; [x](javascript:1)"
VERSIONS = {"python": "3.11.7", "detr-conformance": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6", "scipy": "1.17.1"}


def finding(clause: str, check: str, component: str, verdict: str, message: str = "", **more: Any) -> Finding:
    return Finding(clause, f"What {clause} says.", check, "must", component, verdict, message, **more)


def call(queries: int = 2) -> Call:
    outputs = {
        "pred_logits": torch.zeros(1, queries, 2),
        "pred_boxes": torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.75, 0.25, 0.25]]).repeat(1, queries // 2, 1),
    }
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.75, 0.125, 0.375]])}]
    packed = arrays.to_text(outputs, targets)
    return Call({"num_classes": 1}, packed, {"final": [[(0, 0)]]}, {"final": [[(1, 0)]]})


def evidence(**more: Any) -> Evidence:
    numbers = Numbers(0.875, 0.75, 2.1e-6, {"l1-on-corners": 0.75, "l1-halved": 0.4375, "far-away": 1e9})
    plain = Evidence(
        "a case", "1 image, 1 target\nimage 0 target 0: box (0.5, 0.75, 0.125, 0.375)", "loss_bbox", "0.875", "0.75",
        "off -14.3 %, allowed ±2.1e-06", "Σ |Δ|₁ / nb", call(), numbers,
    )  # fmt: skip
    return replace(plain, **more)


LOOKS = Diagnosis((("l1-on-corners", "L1 on corners."),), 24, 24, "usual fix: compare centres and sides")
GRADIENT = Gradient("loss_giou", "pred_boxes", 0, [[0.5, -0.25, 1.0, 2.0]], [[0.5, -0.25, 0.0, float("nan")]])
FINDINGS = (
    finding("MATCH-2", "the_assignment_is_optimal", "matching", "pass", decided=40),
    finding("NORM-1", "loss_bbox_is_the_sum", "L1", "fail", "NORM-1  What is wrong.\n      got  `0.75`",
            evidence=evidence(), diagnosis=LOOKS, decided=24),
    finding("NORM-3", "nb_counts_targets", "L1", "blocked", "blocked by NORM-1", blocked_by="loss_bbox_is_the_sum"),
    finding("GRAD-1", "boxes_get_the_gradient", "gradients", "fail", "GRAD-1  What is wrong.",
            evidence=evidence(gradient=GRADIENT, numbers=Numbers(float("inf"), float("nan"), 1e-6))),
    finding("DEVICE-1", "an_accelerator_agrees", "devices", "declined", "no accelerator was asked for"),
)  # fmt: skip


def report(**more: Any) -> Report:
    plain = Report(
        "mypkg.criterion", "detr", "given", "must", "quick", 0, {"giou_eps": 1e-6}, VERSIONS, FINDINGS,
        ("weight_dict is made by the adapter",), 3.5, spec="mypkg.criterion",
    )  # fmt: skip
    return replace(plain, **more)


right = report(candidate="mypkg.right", findings=FINDINGS[:1])
