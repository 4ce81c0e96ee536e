"""How a finding reads: one function builds every message."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from detr_conformance.cases import Case
from detr_conformance.findings import Diagnosis, Evidence

FEW: Final = 120  # numbers that are still printed in full
INDENT: Final = " " * 12
WIDTH: Final = 80


def failure(
    clause: str,
    sentence: str,
    level: str,
    evidence: Evidence,
    candidate: str,
    diagnosis: Diagnosis | None = None,
    option: Mapping[str, Any] | None = None,
) -> str:
    """The message of a failed check: clause, inputs, want and got, and the line that runs it again."""
    head = textwrap.wrap(f"{clause}  {sentence}", WIDTH - 8)
    lines = [f"{head[0]:<{WIDTH - 6}}{level:>6}", *(f"      {line}" for line in head[1:])]
    lines += _field("inputs", evidence.inputs)
    lines += _field("quantity", evidence.what)
    lines += _field("want", evidence.want + (f"   {evidence.how}" if evidence.how else ""))
    lines += _field("got", evidence.got + (f"   ({evidence.allowed})" if evidence.allowed else ""))
    if diagnosis:
        word, together = (" and ", " together") if diagnosis.together else (" or ", "")
        known = word.join(f'{id} "{sentence.rstrip(".")}"' for id, sentence in diagnosis.faults)
        lines += _field("looks like", f"{known}{together} ({diagnosis.agree} of {diagnosis.tried} inputs)")
        lines += _field("", diagnosis.advice) if diagnosis.advice else []
    if option:
        named = ", ".join(f"{name}={value!r}" for name, value in option.items())
        lines += _field("explained", f"by the option {named}: if that is meant, declare it,")
        lines += _field("", f"Candidate(…, options={dict(option)!r})")
    lines.append(f"      {'rerun':<12}pytest --candidate={candidate} --clause={clause}")  # in one line, to be copied
    return "\n".join(lines)


def _field(name: str, text: str) -> list[str]:
    """``name      text``, each line of the text wrapped beside the name."""
    lines: list[str] = []
    for line in text.splitlines() or [""]:
        lines += _wrapped(line, WIDTH - 18, "    " if lines else "")
    first, *rest = lines
    return [f"      {name:<12}{first}", *(f"      {INDENT}{line}" for line in rest)]


def _wrapped(line: str, width: int, inner: str) -> list[str]:
    """A line in lines of ``width``, broken between its parts, which two spaces divide, before anywhere else."""
    if len(line) <= width:
        return [line]
    parts = [part for part in line.split("  ") if part]
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += "  " + part
        else:
            lines.append(inner + part)
    found: list[str] = []
    for one in lines:
        found += textwrap.wrap(one, width, subsequent_indent=inner, break_long_words=False)
    return found


def inputs(case: Case) -> str:
    """A case in words, and in numbers where it has few."""
    if case.words:
        return case.words
    o = case.options
    channels = int(case.outputs["pred_logits"].shape[-1])
    kind = {"softmax": f"{_many(o.num_classes, 'class')} and no object", "focal": _many(o.num_classes, "class")}
    targets = "+".join(map(str, case.counts)) + " targets" if len(case.counts) > 1 else _many(case.total, "target")
    words = [_many(len(case.counts), "image"), targets, kind.get(o.class_loss, _many(channels, "token"))]
    layers = (*case.layers, *case.denoising)
    words += [f"{n}: {_many(case.predictions(n)['pred_logits'].shape[1], 'query')}" for n in layers]
    if case.denoising:
        words.append(_many(case.outputs["dn_meta"]["num_dn_group"], "denoising group"))
    if case.has_masks:
        sizes = [case.outputs["pred_masks"], *(t["masks"] for t in case.targets)]
        words.append("masks " + ", ".join("×".join(map(str, s.shape[-2:])) for s in sizes) + ", the first predicted")
    lines = [", ".join(words)]
    numbers = sum(v.numel() for n in layers for v in case.predictions(n).values())
    numbers += sum(t["masks"].numel() for t in case.targets if case.has_masks)
    if numbers + 4 * case.total > FEW:
        return f"{lines[0]} ({case.label})"
    for layer in layers:
        part = case.predictions(layer)
        for b in range(len(case.counts)):
            for q in range(part["pred_logits"].shape[1]):
                row = f"box {_row(part['pred_boxes'][b, q])}  logits {_row(part['pred_logits'][b, q])}"
                row += f"  mask {_rows(part['pred_masks'][b, q])}" if "pred_masks" in part else ""
                where = f"{layer} image" if len(layers) > 1 else "image"
                lines.append(f"{where} {b} query {q}: {row}")
    for b, target in enumerate(case.targets):
        for t in range(len(target["labels"])):
            tokens = (
                f", tokens {target['token_labels'][t].nonzero()[:, 0].tolist()}" if "token_labels" in target else ""
            )
            row = f"box {_row(target['boxes'][t])}  label {int(target['labels'][t])}{tokens}"
            row += f"  mask {_rows(target['masks'][t])}" if case.has_masks else ""
            lines.append(f"image {b} target {t}: {row}")
    return "\n".join(lines)


def _row(values: Tensor) -> str:
    numbers = values.tolist()
    if len(numbers) > 4 and len(set(numbers)) == 1:
        return f"all {numbers[0]:.6g}"
    return "(" + ", ".join(f"{v:.6g}" for v in numbers) + ")"


def _rows(values: Tensor) -> str:
    return "; ".join(" ".join(f"{float(v):.6g}" for v in row) for row in values)


def _many(n: int, what: str) -> str:
    if n == 1:
        return f"1 {what}"
    plural = {"query": "queries", "class": "classes"}.get(what, f"{what}s")
    return f"{n} {plural}"
