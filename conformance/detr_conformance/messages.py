"""How a finding reads: one function builds every message."""

from __future__ import annotations

import textwrap
from typing import Final

from torch import Tensor

from detr_conformance.cases import Case
from detr_conformance.findings import Diagnosis, Evidence

FEW: Final = 120  # numbers that are still printed in full
INDENT: Final = " " * 10


def failure(
    clause: str, sentence: str, level: str, evidence: Evidence, candidate: str, diagnosis: Diagnosis | None = None
) -> str:
    """The message of a failed check: clause, inputs, want and got, and the line that runs it again."""
    head = textwrap.wrap(f"{clause}  {sentence}", 92)
    lines = [f"{head[0]:<94}{level}", *(f"      {line}" for line in head[1:])]
    lines += _field("inputs", evidence.inputs)
    lines += _field("quantity", evidence.what)
    lines += _field("want", evidence.want + (f"   {evidence.how}" if evidence.how else ""))
    lines += _field("got", evidence.got + (f"   ({evidence.allowed})" if evidence.allowed else ""))
    if diagnosis:
        known = " or ".join(f'{id} "{sentence}"' for id, sentence in diagnosis.faults)
        lines += _field("looks like", f"{known} ({diagnosis.agree} of {diagnosis.tried} inputs)")
    lines += _field("rerun", f"pytest --candidate={candidate} --clause={clause}")
    return "\n".join(lines)


def _field(name: str, text: str) -> list[str]:
    first, *rest = text.splitlines() or [""]
    return [f"      {name:<10}{first}", *(f"      {INDENT}{line}" for line in rest)]


def inputs(case: Case) -> str:
    """A case in words, and in numbers where it has few."""
    o = case.options
    kind = {"softmax": f"{o.num_classes} classes and no object", "focal": f"{o.num_classes} classes"}
    words = [
        _many(len(case.counts), "image"),
        f"{'+'.join(map(str, case.counts))} targets" if len(case.counts) > 1 else _many(case.total, "target"),
        kind.get(o.class_loss, _many(int(case.outputs["pred_logits"].shape[-1]), "token")),
        *(f"{n}: {case.predictions(n)['pred_logits'].shape[1]} queries" for n in case.layers),
    ]
    lines = [", ".join(words)]
    numbers = sum(v.numel() for n in case.layers for v in case.predictions(n).values())
    if numbers + 4 * case.total > FEW:
        return f"{lines[0]} ({case.label})"
    for layer in case.layers:
        part = case.predictions(layer)
        for b in range(len(case.counts)):
            for q in range(part["pred_logits"].shape[1]):
                where = f"{layer} image {b} query {q}"
                lines.append(
                    f"{where:<24}logits {_row(part['pred_logits'][b, q])}  box {_row(part['pred_boxes'][b, q])}"
                )
    for b, target in enumerate(case.targets):
        for t in range(len(target["labels"])):
            tokens = (
                f"  tokens {target['token_labels'][t].nonzero()[:, 0].tolist()}" if "token_labels" in target else ""
            )
            where = f"image {b} target {t}"
            lines.append(f"{where:<24}label {int(target['labels'][t])}{tokens}  box {_row(target['boxes'][t])}")
    return "\n".join(lines)


def _row(values: Tensor) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values.tolist()) + ")"


def _many(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
