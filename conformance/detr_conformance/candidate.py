"""From a string to a bound criterion.

A candidate is a factory ``build_criterion(...)``, a module with one, a DETR-shaped module, a criterion itself, or a
``Candidate`` for what does not fit by itself. Binding finds out which options the candidate lets vary, and its
profile; calling it is left to ``experiments``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from detr_conformance import cleaning
from detr_conformance.errors import CandidateError
from detr_conformance.registry import near
from detr_reference.options import PROFILES, Options, options_of

ENTRY_POINTS: Final = "detr_conformance.candidates"
FACTORY_OPTIONS: Final = (
    "num_classes",
    "num_decoder_layers",
    "focal_alpha",
    "focal_gamma",
    "eos_coef",
    "set_cost_class",
    "set_cost_bbox",
    "set_cost_giou",
    "ce_loss_coef",
    "bbox_loss_coef",
    "giou_loss_coef",
    "mask_loss_coef",
    "dice_loss_coef",
    "losses",
    "two_stage",
)
WEIGHT_OPTIONS: Final = frozenset({"ce_loss_coef", "bbox_loss_coef", "giou_loss_coef", "num_decoder_layers"})


@dataclass(frozen=True)
class Candidate:
    """A criterion that does not fit by itself.

    ``factory``
        called by keyword with those options of ``build_criterion`` that its signature names; returns the criterion.
    ``profile``
        detr, deformable-detr, dino or grounding-dino.
    ``options``
        legitimate differences from the profile's defaults, judged against their own expected values
        (``giou_eps=1e-6``, ``class_divisor="matches"``, ``encoder_suffix="_interm"``, …).
    ``rename``
        the candidate's names of losses to the contract's: ``{"loss_box": "loss_bbox"}``; suffixes stay.
    ``own_weights``
        False where ``weight_dict`` was not made by the candidate, so that its values are not judged.
    ``positive_map``
        what builds the class → token map [K, T] of a caption (grounding-dino), called by those names of arguments
        that ``positive_maps`` lists: caption, names, tokenizer, …; in a module, ``create_positive_map``.
    """

    factory: Callable[..., Any]
    profile: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    own_weights: bool = True
    positive_map: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Bound:
    """A candidate ready to be called.

    ``varies``: the options that the factory names; all others stay at ``options`` · ``spec``: the string that it
    was found by, "" for a live object · ``device``: the one that it is compared on with the CPU, ``cpu`` where none
    was asked for, ``none`` where there is none.
    """

    name: str
    candidate: Candidate
    profile: str
    profile_from: str
    options: Options
    varies: frozenset[str]
    passes: frozenset[str]
    spec: str = ""
    device: str = "cpu"

    def build(self, options: Options) -> Any:
        """The criterion under ``options``; those that its signature does not name are left out."""
        values = {name: getattr(options, name) for name in self.passes if hasattr(options, name)}
        if "losses" in values:
            values["losses"] = list(options.losses)
        if "profile" in self.passes:
            values["profile"] = self.profile
        return self.candidate.factory(**values)


def resolve(spec: Any) -> Candidate:
    """The candidate behind an entry point, module, ``module:attribute``, ``file.py:attribute`` or live object.

    Raises CandidateError where there is none, or where what is found cannot be a criterion.
    """
    if isinstance(spec, Candidate):
        return _checked(spec)
    if not isinstance(spec, str):
        return _checked(_from_object(spec, getattr(spec, "__qualname__", None) or type(spec).__qualname__))
    return _checked(_from_object(_find(spec), spec))


def bind(spec: Any, profile: str | None = None) -> Bound:
    """Bind a candidate, with ``profile`` given or else declared or guessed. Raises CandidateError."""
    candidate = resolve(spec)
    names, every = _signature(candidate.factory)
    if profile is not None:
        source = "given"
    elif candidate.profile is not None:
        profile, source = candidate.profile, "declared by the candidate"
    else:
        profile, source = guess_profile(candidate.factory)
    try:
        options = options_of(profile).with_(**candidate.options)
    except ValueError as error:
        raise CandidateError(f"candidate {candidate.name}: {error}") from None
    passes = set(FACTORY_OPTIONS) if every else names & set(FACTORY_OPTIONS)
    if "profile" in names:
        passes.add("profile")
    for name in names & {f for f in Options.__dataclass_fields__ if f not in FACTORY_OPTIONS}:
        passes.add(name)  # an option of ours that the factory knows by name: giou_eps, class_divisor, …
    varies = frozenset(passes) & frozenset(FACTORY_OPTIONS) - set(candidate.options)
    found = spec if isinstance(spec, str) else ""
    return Bound(candidate.name, candidate, profile, source, options, varies, frozenset(passes), found)


def guess_profile(factory: Callable[..., Any]) -> tuple[str, str]:
    """A profile and the reason for it, from what the factory's signature names. Raises CandidateError."""
    parameters = _parameters(factory)
    default = parameters["profile"].default if "profile" in parameters else None
    if isinstance(default, str) and default in PROFILES:
        return default, "the default of its own argument 'profile'"
    names = set(parameters)
    if isinstance(factory, _Built):
        factory = factory.criterion if inspect.isroutine(factory.criterion) else type(factory.criterion)
    try:
        source = inspect.getsource(inspect.getmodule(inspect.unwrap(factory)) or factory)
    except (OSError, TypeError):
        source = ""
    if "token_labels" in source or "positive_map" in source:
        return "grounding-dino", "guessed: its source reads token_labels"
    if "interm_outputs" in source:
        return "dino", "guessed: its source reads interm_outputs"
    if "eos_coef" in names and "focal_alpha" not in names:
        return "detr", "guessed: it takes eos_coef and no focal_alpha"
    if "focal_alpha" in names and "eos_coef" not in names:
        if "num_classes" in names:
            return "deformable-detr", "guessed: it takes focal_alpha and num_classes"
        return "grounding-dino", "guessed: it takes focal_alpha and no num_classes"
    for word, profile in (("eos_coef", "detr"), ("focal", "deformable-detr"), ("cross_entropy", "detr")):
        if word in source:
            return profile, f"guessed: its source mentions {word}"
    raise CandidateError(
        "the profile cannot be guessed from the candidate's signature; name it with --conformance-profile=, one of "
        + ", ".join(PROFILES)
    )


# --- finding the object ---------------------------------------------------------------------------------------------


def _find(spec: str) -> Any:
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name == spec:
            return _imported(spec, point.load)
    head, _, attribute = spec.rpartition(":")
    if not head or (len(head) == 1 and attribute[:1] in "/\\"):  # a Windows drive is no module
        head, attribute = spec, ""
    if head.endswith(".py"):
        found: Any = _imported(spec, lambda: _import_file(head))
    else:
        found = _imported(spec, lambda: _import_module(head))
    for part in attribute.split(".") if attribute else ():
        if not hasattr(found, part):
            raise CandidateError(f"candidate {spec!r}: {head} has no {part!r}{near(part, dir(found))}")
        found = getattr(found, part)
    return found


def _import_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as ``python -m`` would
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            known = [p.name for p in importlib.metadata.entry_points(group=ENTRY_POINTS)]
            raise CandidateError(
                f"there is no module {error.name!r}, and no entry point of that name{near(name, known)}; a candidate "
                "is an entry point, a module, module:attribute or path/to/file.py:attribute"
            ) from None
        raise


def _import_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise CandidateError(f"there is no file {path!r}")
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _imported(spec: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except CandidateError as error:
        raise CandidateError(f"candidate {spec!r}: {error}") from None
    except (Exception, SystemExit) as error:
        raise CandidateError(f"candidate {spec!r} cannot be imported: {_said(error)}") from error


def _from_object(found: Any, name: str) -> Candidate:
    if isinstance(found, Candidate):
        return found if found.name else Candidate(**{**found.__dict__, "name": name})
    if isinstance(found, ModuleType):
        if hasattr(found, "build_criterion"):
            return _with_builder(_from_object(found.build_criterion, name), found)
        if hasattr(found, "SetCriterion") and hasattr(found, "HungarianMatcher"):
            return _with_builder(_detr_shaped(found, name), found)
        public = [n for n in dir(found) if callable(getattr(found, n)) and not n.startswith("_")]
        raise CandidateError(
            f"candidate {name!r}: the module has neither build_criterion nor SetCriterion with HungarianMatcher"
            f"{near('build_criterion', public)}"
        )
    if not callable(found):
        raise CandidateError(f"candidate {name!r} is a {type(found).__name__}, not a callable or a module")
    if _is_criterion(found):
        return Candidate(_Built(found), name=name)
    return Candidate(found, name=name)


def _with_builder(candidate: Candidate, module: ModuleType) -> Candidate:
    """The candidate with the module's own builder of positive maps, where it declares none."""
    builder = getattr(module, "create_positive_map", None)
    if candidate.positive_map is not None or not callable(builder):
        return candidate
    return replace(candidate, positive_map=builder)


@dataclass(frozen=True)
class _Built:
    """A factory for a criterion that exists already: no option of it can vary."""

    criterion: Any

    def __call__(self) -> Any:
        return self.criterion


def _is_criterion(found: Any) -> bool:
    """A criterion itself rather than a factory: its first two arguments are outputs and targets."""
    if inspect.isclass(found):
        return False
    forward = getattr(found, "forward", found)  # a torch module's __call__ takes anything
    required = [p for p in _parameters(forward).values() if p.default is p.empty and p.kind in (0, 1)]
    return len(required) >= 2 and not {p.name for p in required} & set(FACTORY_OPTIONS)


def _checked(candidate: Candidate) -> Candidate:
    if not callable(candidate.factory):
        raise CandidateError(f"Candidate(factory=…): a {type(candidate.factory).__name__} is not callable")
    if candidate.positive_map is not None and not callable(candidate.positive_map):
        raise CandidateError(f"Candidate(positive_map=…): a {type(candidate.positive_map).__name__} is not callable")
    if candidate.profile is not None and candidate.profile not in PROFILES:
        raise CandidateError(
            f"Candidate(profile={candidate.profile!r}): it must be one of {', '.join(PROFILES)}"
            f"{near(str(candidate.profile), PROFILES)}"
        )
    unknown = [p.name for p in _parameters(candidate.factory).values() if _needed(p) and p.name not in _PASSABLE]
    if unknown:
        raise CandidateError(
            f"candidate {candidate.name}: the factory needs {', '.join(map(repr, unknown))}, which the suite does not "
            f"know; it passes {', '.join(FACTORY_OPTIONS)} by keyword. Give the others a default, or wrap the factory: "
            "Candidate(lambda num_classes: …)"
        )
    return candidate


# --- DETR-shaped modules --------------------------------------------------------------------------------------------

_MATCHER_ARGUMENTS: Final[Mapping[str, str]] = {
    "cost_class": "set_cost_class",
    "cost_bbox": "set_cost_bbox",
    "cost_giou": "set_cost_giou",
    "class_cost": "set_cost_class",
    "bbox_cost": "set_cost_bbox",
    "giou_cost": "set_cost_giou",
    "focal_alpha": "focal_alpha",
    "alpha": "focal_alpha",
    "focal_gamma": "focal_gamma",
    "gamma": "focal_gamma",
}
_CRITERION_ARGUMENTS: Final[Mapping[str, str]] = {
    name: name for name in ("num_classes", "eos_coef", "focal_alpha", "focal_gamma")
} | {"alpha": "focal_alpha", "gamma": "focal_gamma"}


def _detr_shaped(module: ModuleType, name: str) -> Candidate:
    """Bind ``SetCriterion`` and ``HungarianMatcher`` by their constructors' argument names, whatever their order."""
    matcher_takes = _parameters(module.HungarianMatcher)
    criterion_takes = _parameters(module.SetCriterion)
    given = {"matcher", "weight_dict", "losses"}
    for what, takes, known in (
        ("HungarianMatcher", matcher_takes, set(_MATCHER_ARGUMENTS)),
        ("SetCriterion", criterion_takes, set(_CRITERION_ARGUMENTS) | given),
    ):
        unknown = [p.name for p in takes.values() if _needed(p) and p.name not in known]
        if unknown:
            raise CandidateError(
                f"candidate {name!r}: {what} needs {', '.join(map(repr, unknown))}, which the suite does not know; "
                "write a build_criterion(...) that passes it"
            )

    def build(**options: Any) -> Any:
        matcher = module.HungarianMatcher(
            **{a: options[o] for a, o in _MATCHER_ARGUMENTS.items() if a in matcher_takes and o in options}
        )
        weights = _weights(options)
        losses = list(options.get("losses") or ("labels", "boxes", "cardinality"))
        ours = {"matcher": matcher, "weight_dict": weights, "losses": losses}
        arguments = {a: options[o] for a, o in _CRITERION_ARGUMENTS.items() if a in criterion_takes and o in options}
        criterion = module.SetCriterion(**arguments, **{k: v for k, v in ours.items() if k in criterion_takes})
        if not hasattr(criterion, "weight_dict"):
            criterion.weight_dict = weights
        return criterion

    named = {o for a, o in _MATCHER_ARGUMENTS.items() if a in matcher_takes}
    named |= {o for a, o in _CRITERION_ARGUMENTS.items() if a in criterion_takes} | WEIGHT_OPTIONS
    named |= {"losses"} & set(criterion_takes)
    build.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(o, inspect.Parameter.KEYWORD_ONLY, default=None) for o in sorted(named)]
    )
    build.__module__ = module.__name__
    return Candidate(build, name=name, own_weights=False)


def _weights(options: Mapping[str, Any]) -> dict[str, float]:
    base = {f"loss_{k}": options[f"{k}_loss_coef"] for k in ("ce", "bbox", "giou")}
    suffixes = ["", *(f"_{i}" for i in range(options["num_decoder_layers"] - 1)), "_enc", "_interm"]
    return {key + suffix: value for suffix in suffixes for key, value in base.items()}


# --- signatures -----------------------------------------------------------------------------------------------------

_PASSABLE: Final = {*FACTORY_OPTIONS, "profile", *Options.__dataclass_fields__}


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def _signature(function: Callable[..., Any]) -> tuple[set[str], bool]:
    parameters = _parameters(function).values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_KEYWORD,
        parameter.VAR_POSITIONAL,
    )


def _said(error: BaseException) -> str:
    lines = cleaning.exception(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
