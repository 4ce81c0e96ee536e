"""What a failure looks like: the boxes and matchings of its input, and its numbers on a line. Geometry only; the
template draws it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from detr_conformance.findings import Call, Evidence, Numbers

IMAGES: Final = 4  # of one call that are drawn
QUERIES: Final = 12  # of one image that are drawn; beyond, those that are matched
SIDE: Final = 200  # units of a picture for the side of an image
LINE: Final = 640  # units of a number line
MARGIN: Final = 28
FAR: Final = 20.0  # times the distance of want and got: what lies beyond is listed, not drawn


@dataclass(frozen=True)
class Box:
    """``kind``: target or query · corner and sides in units of the picture · ``name`` as the messages count."""

    kind: str
    name: str
    x: float
    y: float
    w: float
    h: float

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box."""
        return self.x + self.w / 2, self.y + self.h / 2


@dataclass(frozen=True)
class Link:
    """A matched pair. ``kind``: both, got (the candidate's alone) or best (the cheapest alone)."""

    kind: str
    query: str
    target: str
    ends: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Picture:
    """One image of the call: ``view`` is the part that is drawn; ``left_out``: what is not, in words."""

    title: str
    view: tuple[float, float, float, float]
    boxes: tuple[Box, ...]
    links: tuple[Link, ...]
    left_out: str

    @property
    def words(self) -> str:
        """The picture for those who do not see it."""
        said = [f"{b.name} at ({b.centre[0] / SIDE:.3g}, {b.centre[1] / SIDE:.3g})" for b in self.boxes]
        said += [f"query {k.query[1:]} matched with target {k.target[1:]} ({k.kind})" for k in self.links]
        return f"{self.title}: {'; '.join(said)}"


@dataclass(frozen=True)
class Mark:
    """A value. ``x``: where it stands on the line, None where it does not; ``row``: how far below its letter is."""

    kind: str
    letter: str
    name: str
    value: float
    x: float | None
    row: int = 0


@dataclass(frozen=True)
class Line:
    """A number line: its marks, the allowed band around want, and values at its ends."""

    marks: tuple[Mark, ...]
    band: tuple[float, float] | None
    ends: tuple[str, str]
    rows: int


def pictures(evidence: Evidence | None) -> list[Picture]:
    """The images of the failing call; none where the input is no call, or cannot be read."""
    if evidence is None or evidence.call is None:
        return []
    from detr_fixtures import arrays

    try:
        data = arrays.from_text(evidence.call.npz)
        return list(_pictures(evidence.call, data))
    except (ValueError, KeyError, IndexError):
        return []


def _pictures(call: Call, data: Mapping[str, Any]) -> Iterator[Picture]:
    layer = _layer(call)
    matched, best = call.matched.get(layer, []), call.best.get(layer, [])
    predicted = _predictions(call, data, layer)
    if predicted is None:
        return
    count = 1 + max((int(name.split("/")[1]) for name in data if name.startswith("targets/")), default=-1)
    differ = [b for b in range(count) if _of(matched, b) != _of(best, b)]
    order = [*differ, *(b for b in range(count) if b not in differ)]
    for b in sorted(order[:IMAGES]):
        targets = _boxes("target", data.get(f"targets/{b}/boxes", ()), None)
        own, cheapest = set(_of(matched, b)), set(_of(best, b))
        many = len(predicted[b]) > QUERIES
        keep = {q for q, _ in own | cheapest} if many else None
        queries = _boxes("query", predicted[b], keep)
        named = {box.name: box for box in (*targets, *queries)}
        links = tuple(
            _link(named, q, t, "both" if (q, t) in own & cheapest else "got" if (q, t) in own else "best")
            for q, t in sorted(own | cheapest)
        )
        told = "" if not many else f"{len(predicted[b]) - len(keep or ())} unmatched queries are not drawn"
        title = f"image {b}" + (f", {layer}" if layer != "final" else "")
        yield Picture(title, _view([*targets, *queries]), (*targets, *queries), links, told)


def _layer(call: Call) -> str:
    """The layer that tells most: the first whose matching is not the cheapest, or the final one."""
    return next((n for n, pairs in call.matched.items() if pairs != call.best.get(n)), "final")


def _predictions(call: Call, data: Mapping[str, Any], layer: str) -> Any:
    path = {"final": "outputs", "enc": f"outputs/{call.options.get('encoder_key')}"}.get(
        layer, f"outputs/aux_outputs/{layer.removeprefix('aux')}"
    )
    key = f"{path}/pred_boxes"
    return next((data[name] for name in (key, f"{key}:bfloat16") if name in data), None)


def _of(pairs: Sequence[Sequence[Sequence[int]]], image: int) -> list[tuple[int, int]]:
    return sorted((int(q), int(t)) for q, t in pairs[image]) if image < len(pairs) else []


def _boxes(kind: str, rows: Any, keep: set[int] | None) -> list[Box]:
    found = []
    for i, row in enumerate(rows):
        values = [float(v) for v in row]
        if (keep is None or i in keep) and len(values) == 4 and all(abs(v) < 100 for v in values):
            cx, cy, w, h = (v * SIDE for v in values)
            found.append(Box(kind, f"{kind[0]}{i}", cx - abs(w) / 2, cy - abs(h) / 2, abs(w), abs(h)))
    return found


def _link(named: Mapping[str, Box], query: int, target: int, kind: str) -> Link:
    one, other = named.get(f"q{query}"), named.get(f"t{target}")
    return Link(kind, f"q{query}", f"t{target}", (*one.centre, *other.centre) if one and other else None)


def _view(boxes: Sequence[Box]) -> tuple[float, float, float, float]:
    """The image, and of boxes that reach beyond it at most half an image more on each side."""
    left, top = (max(-SIDE / 2, min([0.0, *values])) for values in ([b.x for b in boxes], [b.y for b in boxes]))
    ends = [b.x + b.w for b in boxes], [b.y + b.h for b in boxes]
    right, bottom = (min(1.5 * SIDE, max([float(SIDE), *values])) for values in ends)
    return left - 8, top - 8, right - left + 16, bottom - top + 16


def line(numbers: Numbers | None) -> Line | None:
    """Want, got and what known faults make of it."""
    if numbers is None:
        return None
    want, got = numbers.want, numbers.got
    near = [v for v in (want, got) if math.isfinite(v)]
    scale = abs(got - want) if len(near) == 2 else abs(near[0]) if near else 0.0
    known = sorted(numbers.known.items(), key=lambda pair: abs(pair[1] - want) if math.isfinite(want) else 0.0)
    drawn = [v for _, v in known if near and abs(v - near[0]) <= FAR * max(scale, 1e-12)]
    low, high = min([*near, *drawn], default=0.0), max([*near, *drawn], default=0.0)
    span = high - low or abs(low) or 1.0

    def place(value: float) -> float | None:
        on = math.isfinite(value) and low - span / 1e6 <= value <= high + span / 1e6 and bool(near)
        return MARGIN + (value - low) / span * (LINE - 2 * MARGIN) if on else None

    marks = [Mark("want", "want", "want", want, place(want)), Mark("got", "got", "got", got, place(got))]
    taken: list[float] = []  # by row, where its last letter stands
    faults = [Mark("fault", chr(97 + i), id, value, place(value)) for i, (id, value) in enumerate(known)]
    for mark in sorted(faults, key=lambda m: -math.inf if m.x is None else m.x):
        row = 0
        if mark.x is not None:
            row = next((r for r, end in enumerate(taken) if mark.x - end > 14), len(taken))
            taken[row : row + 1] = [mark.x]
        marks.append(Mark("fault", mark.letter, mark.name, mark.value, mark.x, row))
    at, half = place(want), numbers.allowed / span * (LINE - 2 * MARGIN) if math.isfinite(numbers.allowed) else 0.0
    band = (at - half, min(2 * half, LINE)) if at is not None and half > 0.5 else None
    marks = [*marks[:2], *sorted(marks[2:], key=lambda m: m.letter)]
    return Line(tuple(marks), band, (f"{low:.4g}", f"{high:.4g}"), len(taken))
