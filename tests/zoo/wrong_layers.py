"""Mistakes of normalisation, layers, keys, weights, gradients and side effects."""

from __future__ import annotations

import torch

from .port import ALL, SIGMOID, Grounding, Port, Registry

MISTAKES = Registry(globals())
add = MISTAKES.add


def base(s):
    return type(s).__base__


def total_of(targets):
    return sum(len(t["labels"]) for t in targets)


def after(change):
    """Change the finished losses."""
    return lambda s, outputs, targets: change(s, base(s).forward(s, outputs, targets), outputs, targets)


def each(change):
    """Change each finished loss: change(key, value)."""
    return after(lambda s, losses, outputs, targets: {k: change(k, v) for k, v in losses.items()})


def is_aux(key):
    return key.rsplit("_", 1)[-1].isdigit()


def is_encoder(key):
    return key.endswith("_enc")


# -- the number of boxes -------------------------------------------------------------------------------------
def number(change):
    return lambda s, outputs, targets: change(targets, outputs)


def counts(targets):
    return [len(t["labels"]) for t in targets]


def fewest(targets, outputs):
    return max(float(sum(min(n, outputs["pred_logits"].shape[1]) for n in counts(targets))), 1.0)


def of_pairs(s, nb, indices):
    return max(sum(len(q) for q, _ in indices), 1)


add("nb-images", ALL, "NORM-3 NORM-1", "nb counts images.", number=number(lambda t, o: max(float(len(t)), 1.0)))
add(
    "nb-non-empty-images",
    "F",
    "NORM-3",
    "nb counts images with targets.",
    number=number(lambda t, o: max(float(sum(n > 0 for n in counts(t))), 1.0)),
)
add(
    "nb-mean-image",
    "DG",
    "NORM-3 NORM-2",
    "nb is the mean count an image.",
    number=number(lambda t, o: max(sum(counts(t)) / max(len(t), 1), 1.0)),
)
add(
    "nb-largest-image",
    "F",
    "NORM-3 NORM-2",
    "nb is the largest count of an image.",
    number=number(lambda t, o: max([1.0, *map(float, counts(t))])),
)
add(
    "nb-first-image",
    "G",
    "NORM-3 NORM-2",
    "nb is the count of image 0.",
    number=number(lambda t, o: float(max([*counts(t)[:1], 1]))),
)
add(
    "nb-queries",
    "DF",
    "NORM-3",
    "nb counts queries.",
    number=number(lambda t, o: float(max(o["pred_logits"][..., 0].numel(), 1))),
)
add("nb-matches", ALL, "NORM-3", "nb counts min(Q, n) of each image.", number=number(fewest))
add(
    "nb-classes",
    "G",
    "NORM-3",
    "nb counts distinct labels.",
    number=number(lambda t, o: float(max(len({y for x in t for y in x["labels"].tolist()}), 1))),
)
add("nb-plus-one", "DF", "NORM-1", "nb = N + 1.", number=number(lambda t, o: total_of(t) + 1.0))
add(
    "nb-clamped-at-two",
    "G",
    "NORM-1 NORM-5",
    "nb is at least 2.",
    number=number(lambda t, o: max(float(total_of(t)), 2.0)),
)
add(
    "nb-not-clamped",
    SIGMOID,
    "NORM-5 CLS-8",
    "nb = 0 without targets.",
    number=number(lambda t, o: torch.tensor(float(total_of(t)))),
)
add(
    "nb-not-clamped-detr",
    "D",
    "NORM-5",
    "nb = 0 without targets.",
    number=number(lambda t, o: torch.tensor(float(total_of(t)))),
)
add(
    "nb-clamped-at-eps",
    SIGMOID,
    "NORM-5 CLS-8",
    "nb is at least 1e-6.",
    number=number(lambda t, o: max(float(total_of(t)), 1e-6)),
)
add(
    "nb-per-image-clamp",
    "DFG",
    "NORM-5 NORM-3",
    "Every image counts at least 1.",
    number=number(lambda t, o: float(max(sum(max(n, 1) for n in counts(t)), 1))),
)
add("nb-root", "D", "NORM-1", "√N.", number=number(lambda t, o: max(float(total_of(t)), 1.0) ** 0.5))
add("box-nb-matches", "FD", "NORM-3 NORM-4", "The box losses are divided by the layer's matches.", box_divisor=of_pairs)
add(
    "box-nb-over-images",
    "G",
    "NORM-1 NORM-3",
    "nb is multiplied by the number of images.",
    box_divisor=lambda s, nb, i: nb * max(len(i), 1),
)
add("box-undivided", "DG", "NORM-1", "The box losses are not divided.", box_divisor=lambda s, nb, i: 1.0)
add("box-divided-twice", "F", "NORM-1", "The box losses are divided twice.", box_divisor=lambda s, nb, i: nb * nb)


def image_mean_boxes(s, layer, targets, indices, nb):
    """A mean over an image's pairs, then over images."""
    parts = [
        Port.loss_boxes(
            s,
            {**layer, "pred_boxes": layer["pred_boxes"][b : b + 1]},
            [targets[b]],
            [indices[b]],
            max(len(indices[b][0]), 1),
        )
        for b in range(len(targets))
    ] or [Port.loss_boxes(s, layer, targets, indices, nb)]
    return {k: torch.stack([p[k] for p in parts]).mean() for k in parts[0]}


def number_of_layers(s, layer, targets, nb, suffix):
    return base(s).one_layer(s, layer, targets, nb * s.o.num_decoder_layers if is_aux(suffix or "x") else nb, suffix)


def layer_matches_nb(s, layer, targets, nb, suffix):
    indices = s.match(layer, targets)
    return s.losses_at(layer, targets, indices, max(sum(len(q) for q, _ in indices), 1) if suffix else nb, suffix)


def encoder_by_queries(s, layer, targets, nb, suffix):
    return base(s).one_layer(s, layer, targets, layer["pred_logits"].shape[1] if suffix == "_enc" else nb, suffix)


add(
    "box-image-means",
    ALL,
    "NORM-2 NORM-1",
    "Box losses are means an image, then of images.",
    loss_boxes=image_mean_boxes,
)
add(
    "aux-divided-by-layers",
    "D",
    "NORM-4 LAYER-2",
    "Auxiliary losses have nb times the number of layers.",
    one_layer=number_of_layers,
)
add(
    "aux-nb-matches", "F", "NORM-4 LAYER-2", "Auxiliary layers divide by their own matches.", one_layer=layer_matches_nb
)
add(
    "enc-nb-queries",
    "G",
    "NORM-4 LAYER-4",
    "Encoder losses divide by the encoder's queries.",
    one_layer=encoder_by_queries,
)


# -- nothing to match ----------------------------------------------------------------------------------------
def nothing(change):
    """Change the box losses of a batch without targets."""

    def loss_boxes(s, layer, targets, indices, nb):
        right = Port.loss_boxes(s, layer, targets, indices, nb)
        return right if sum(len(q) for q, _ in indices) else change(right, layer)

    return loss_boxes


def key_set(change):
    return after(lambda s, losses, outputs, targets: change(losses, total_of(targets)))


add(
    "empty-nan",
    ALL,
    "NORM-5",
    "A mean of nothing: NaN without targets.",
    loss_boxes=nothing(lambda r, layer: {k: v + torch.nan for k, v in r.items()}),
)
add(
    "empty-python-zero",
    "DF",
    "NORM-5 KEY-2 GRAD-5",
    "The float 0.0 without targets.",
    loss_boxes=nothing(lambda r, layer: dict.fromkeys(r, 0.0)),
)
add(
    "empty-detached-zero",
    ALL,
    "NORM-5 GRAD-5",
    "A constant zero tensor without targets.",
    loss_boxes=nothing(lambda r, layer: {k: torch.zeros(()) for k in r}),
)
add(
    "empty-keys-missing",
    "DG",
    "KEY-3 NORM-5",
    "No box losses without targets.",
    loss_boxes=nothing(lambda r, layer: {}),
)
add(
    "empty-shape",
    "F",
    "KEY-2 NORM-5",
    "An empty tensor without targets.",
    loss_boxes=nothing(lambda r, layer: {k: layer["pred_boxes"].flatten()[:0] for k in r}),
)
add(
    "empty-no-losses",
    "FG",
    "KEY-3 CLS-8",
    "An early return without targets: no keys at all.",
    forward=lambda s, o, t: base(s).forward(s, o, t) if total_of(t) else {},
)
add(
    "empty-boxes-pulled",
    "G",
    "NORM-5 GRAD-1",
    "Without targets, boxes are pulled to nothing by their size.",
    loss_boxes=nothing(lambda r, layer: {k: v + 0.01 * layer["pred_boxes"][..., 2:].mean() for k, v in r.items()}),
)
add(
    "empty-raises",
    "D",
    "MATCH-5 NORM-5",
    "Raises without targets.",
    number=number(lambda t, o: float(total_of(t)) if total_of(t) else float("".join(["no"]))),
)


# -- auxiliary layers ----------------------------------------------------------------------------------------
def layers(change):
    """Change the list of (layer, suffix, targets)."""

    def found(s, outputs, targets):
        return iter(change(s, list(base(s).layers(s, outputs, targets)), outputs, targets))

    return found


def aux_of(all_layers):
    return [x for x in all_layers if is_aux(x[1] or "x")]


def others(all_layers):
    return [x for x in all_layers if not is_aux(x[1] or "x")]


def renumbered(change):
    """Change the order of auxiliary layers under unchanged suffixes."""

    def found(s, every, outputs, targets):
        aux = aux_of(every)
        changed = change(aux)
        return others(every) + [(layer, f"_{i}", t) for i, (layer, _, t) in enumerate(changed)]

    return layers(found)


def aux_takes(*keys):
    """Auxiliary layers take some predictions of the final one."""
    return layers(
        lambda s, every, o, t: [
            ({**layer, **{k: o[k] for k in keys}}, suffix, x) if is_aux(suffix or "x") else (layer, suffix, x)
            for layer, suffix, x in every
        ]
    )


def layer_change(which, change):
    return layers(
        lambda s, every, o, t: [
            (change(layer, o), suffix, x) if which(suffix or "x") else (layer, suffix, x) for layer, suffix, x in every
        ]
    )


def without(which, name):
    """Leave a loss out of some layers."""
    return after(lambda s, losses, o, t: {k: v for k, v in losses.items() if not (which(k) and k.startswith(name))})


def averaged_with_final(layer, outputs):
    return {**layer, "pred_boxes": (layer["pred_boxes"] + outputs["pred_boxes"]) / 2}


def detached(layer, outputs):
    return {**layer, **{k: layer[k].detach() for k in ("pred_logits", "pred_boxes")}}


def reuse(which):
    def forward(s, outputs, targets):
        s.check(outputs, targets)
        targets = s.clean(targets, outputs["pred_boxes"])
        nb = s.number(outputs, targets)
        losses, first = {}, None
        for layer, suffix, wanted in s.layers(outputs, targets):
            layer = s.with_mask(s.up(layer), outputs, suffix)
            pairs = s.match(layer, wanted)
            if first is None or (suffix == "_0" and which == "first-aux"):
                first = pairs
            q_count = layer["pred_logits"].shape[1]
            fits = all(
                len(q) == len(p) and (not len(q) or int(q.max()) < q_count)
                for (q, _), (p, _) in zip(first, pairs, strict=True)
            )
            used = {
                "all": suffix != "",
                "aux": is_aux(suffix or "x"),
                "enc": suffix == "_enc",
                "first-aux": is_aux(suffix or "x"),
            }[which]
            losses |= s.losses_at(layer, wanted, first if used and fits else pairs, nb, suffix)
        return losses

    return forward


add(
    "aux-from-one",
    ALL,
    "LAYER-1 KEY-1",
    "Suffixes count from 1.",
    layers=layers(lambda s, e, o, t: [(a, f"_{int(k[1:]) + 1}" if is_aux(k or "x") else k, x) for a, k, x in e]),
)
add(
    "aux-last-lost",
    ALL,
    "LAYER-1 KEY-3",
    "The last auxiliary layer is left out.",
    layers=renumbered(lambda aux: aux[:-1]),
)
add(
    "aux-first-lost",
    "F",
    "LAYER-1",
    "The first auxiliary layer is left out and the rest move up.",
    layers=renumbered(lambda aux: aux[1:]),
)
add("aux-none", "DG", "LAYER-1", "Auxiliary layers are not trained.", layers=layers(lambda s, e, o, t: others(e)))
add(
    "aux-only-first",
    "F",
    "LAYER-1",
    "Only the first auxiliary layer is trained.",
    layers=renumbered(lambda aux: aux[:1]),
)
add("aux-at-most-two", "D", "LAYER-1", "Two auxiliary layers at most.", layers=renumbered(lambda aux: aux[:2]))
add(
    "aux-reversed",
    "DG",
    "LAYER-1 LAYER-3",
    "Suffixes count from the last layer.",
    layers=renumbered(lambda aux: aux[::-1]),
)
add(
    "aux-shifted-by-final",
    "F",
    "LAYER-1 LAYER-3",
    "Suffix 0 holds the final layer, aux i is under i + 1's place.",
    layers=layers(
        lambda s, e, o, t: (
            others(e) + [(prev[0], k, x) for prev, (_, k, x) in zip([e[0], *aux_of(e)], aux_of(e), strict=False)]
        )
    ),
)
add(
    "aux-stale-layer",
    "G",
    "LAYER-3",
    "Every auxiliary loss uses the last auxiliary layer (late binding).",
    layers=renumbered(lambda aux: aux[-1:] * len(aux)),
)
add(
    "aux-final-logits",
    "DF",
    "LAYER-2 LAYER-3",
    "Auxiliary layers use the final logits.",
    layers=aux_takes("pred_logits"),
)
add("aux-final-boxes", "FG", "LAYER-2 LAYER-3", "Auxiliary layers use the final boxes.", layers=aux_takes("pred_boxes"))
add(
    "aux-boxes-averaged",
    "G",
    "LAYER-2 LAYER-3",
    "Auxiliary boxes are averaged with the final ones.",
    layers=layer_change(is_aux, averaged_with_final),
)
add(
    "aux-detached",
    ALL,
    "GRAD-5 GRAD-1 LAYER-2",
    "Auxiliary predictions are detached.",
    layers=layer_change(is_aux, detached),
)
add("aux-no-class-loss", "DF", "LAYER-1", "Auxiliary layers have no class loss.", forward=without(is_aux, "loss_ce"))
add("aux-no-giou", "G", "LAYER-1", "Auxiliary layers have no loss_giou.", forward=without(is_aux, "loss_giou"))
add(
    "aux-no-boxes",
    "F",
    "LAYER-1",
    "Auxiliary layers have no box losses.",
    forward=after(lambda s, r, o, t: {k: v for k, v in r.items() if not is_aux(k) or k.startswith("loss_ce")}),
)
add("aux-reuses-final", ALL, "MATCH-7 LAYER-2", "Auxiliary layers use the final layer's pairs.", forward=reuse("aux"))
add(
    "aux-reuses-first",
    "F",
    "MATCH-7 LAYER-2",
    "Auxiliary layers use the first one's pairs.",
    forward=reuse("first-aux"),
)
add(
    "all-reuse-final",
    "DG",
    "MATCH-7 LAYER-2",
    "Every further layer uses the final layer's pairs.",
    forward=reuse("all"),
)
add(
    "enc-reuses-final",
    "FG",
    "MATCH-7 LAYER-4",
    "The encoder uses the final layer's pairs where they fit.",
    forward=reuse("enc"),
)
add("aux-halved", "DF", "LAYER-2", "Auxiliary losses are halved.", forward=each(lambda k, v: v / 2 if is_aux(k) else v))
add(
    "aux-averaged",
    "G",
    "LAYER-2",
    "Auxiliary losses are divided by their number.",
    forward=after(lambda s, r, o, t: {k: v / len(o["aux_outputs"]) if is_aux(k) else v for k, v in r.items()}),
)
add(
    "aux-decayed",
    "F",
    "LAYER-2",
    "Auxiliary loss i is multiplied by 0.9^(L−i).",
    forward=after(
        lambda s, r, o, t: {
            k: v * 0.9 ** (len(o["aux_outputs"]) - int(k.rsplit("_", 1)[1])) if is_aux(k) else v for k, v in r.items()
        }
    ),
)
add(
    "aux-accumulated",
    "D",
    "LAYER-3",
    "Auxiliary losses add up those before them.",
    forward=after(
        lambda s, r, o, t: {
            k: sum(r[k.rsplit("_", 1)[0] + f"_{j}"] for j in range(int(k.rsplit("_", 1)[1]) + 1)) if is_aux(k) else v
            for k, v in r.items()
        }
    ),
)
add(
    "final-is-mean",
    "DG",
    "LAYER-3",
    "The final loss is averaged with the last auxiliary one.",
    forward=after(
        lambda s, r, o, t: {
            k: (v + r[f"{k}_{len(o['aux_outputs']) - 1}"]) / 2
            if not is_aux(k) and not is_encoder(k) and o.get("aux_outputs")
            else v
            for k, v in r.items()
        }
    ),
)
add(
    "final-also-as-aux",
    "DF",
    "LAYER-1 KEY-4",
    "The final losses appear once more as one more layer.",
    forward=after(
        lambda s, r, o, t: (
            r | {f"{k}_{len(o.get('aux_outputs', []))}": v for k, v in r.items() if not is_aux(k) and not is_encoder(k)}
        )
    ),
)
add(
    "aux-summed-into-final",
    "F",
    "LAYER-1 LAYER-3",
    "Auxiliary losses are added to the final keys.",
    forward=after(
        lambda s, r, o, t: {
            k: v + sum((x for a, x in r.items() if is_aux(a) and a.rsplit("_", 1)[0] == k), 0 * v)
            for k, v in r.items()
            if not is_aux(k)
        }
    ),
)


# -- encoder outputs -----------------------------------------------------------------------------------------
def first_rows(layer, outputs):
    q_count = outputs["pred_logits"].shape[1]
    return {**layer, **{k: layer[k][:, :q_count] for k in ("pred_logits", "pred_boxes")}}


def top_rows(layer, outputs):
    keep = layer["pred_logits"].detach().amax(-1).topk(max(1, layer["pred_logits"].shape[1] // 2), 1).indices
    return {
        **layer,
        **{
            k: torch.stack([v[i] for v, i in zip(layer[k], keep, strict=True)]) if len(keep) else layer[k]
            for k in ("pred_logits", "pred_boxes")
        },
    }


def encoder_suffix(suffix):
    return layers(lambda s, e, o, t: [(a, suffix(e) if k == "_enc" else k, x) for a, k, x in e])


def match_with_real(s, layer, targets, nb, suffix):
    """The encoder is matched with the real labels and trained with class 0."""
    if suffix != "_enc":
        return base(s).one_layer(s, layer, targets, nb, suffix)
    return s.losses_at(layer, targets, s.match(layer, s._real), nb, suffix)


def remembering(s, outputs, targets):
    s._real = s.clean(targets, outputs["pred_boxes"])
    try:
        return base(s).forward(s, outputs, targets)
    finally:
        del s._real


def single_channel(s, layer, targets, nb, suffix):
    return base(s).one_layer(
        s, layer if suffix != "_enc" else {**layer, "pred_logits": layer["pred_logits"][..., :1]}, targets, nb, suffix
    )


def ones_for_labels(s, targets):
    return [{**t, "labels": torch.ones_like(t["labels"])} for t in targets]


def first_token_of_all(s, targets):
    return [
        {**t, "token_labels": t["token_labels"] * 0 + (torch.arange(t["token_labels"].shape[-1]) == 0)} for t in targets
    ]


def every_token(s, targets):
    return [{**t, "token_labels": t["token_labels"] * 0 + t["token_labels"].any(0) * 1.0} for t in targets]


add(
    "enc-none",
    SIGMOID,
    "LAYER-4",
    "Encoder outputs are not trained.",
    layers=layers(lambda s, e, o, t: [x for x in e if x[1] != "_enc"]),
)
add("enc-real-labels", "F", "LAYER-4", "Encoder outputs aim at the real classes.", encoder_targets=lambda s, t: t)
add("enc-label-one", "F", "LAYER-4", "Encoder outputs aim at class 1.", encoder_targets=ones_for_labels)
add(
    "enc-matched-with-real-labels",
    "F",
    "LAYER-4",
    "The encoder is matched with real labels, trained with class 0.",
    one_layer=match_with_real,
    forward=remembering,
)
add("enc-one-channel", "F", "LAYER-4", "Only channel 0 of the encoder is trained.", one_layer=single_channel)
add(
    "enc-zero-tokens",
    "G",
    "LAYER-4",
    "Encoder outputs aim at token 0, the binary habit.",
    encoder_targets=first_token_of_all,
)
add("enc-any-token", "G", "LAYER-4", "Encoder outputs aim at all tokens of any target.", encoder_targets=every_token)
add(
    "enc-first-queries",
    SIGMOID,
    "LAYER-4",
    "Encoder outputs are cut to the decoder's number of queries.",
    layers=layer_change(lambda k: k == "_enc", first_rows),
)
add(
    "enc-top-half",
    "F",
    "LAYER-4",
    "The better half of the encoder's queries is trained.",
    layers=layer_change(lambda k: k == "_enc", top_rows),
)
add(
    "enc-detached",
    SIGMOID,
    "LAYER-4 GRAD-5",
    "Encoder outputs are detached.",
    layers=layer_change(lambda k: k == "_enc", detached),
)
add(
    "enc-boxes-detached",
    "G",
    "LAYER-4 GRAD-1",
    "Encoder boxes are detached.",
    layers=layer_change(lambda k: k == "_enc", lambda a, o: {**a, "pred_boxes": a["pred_boxes"].detach()}),
)
add("enc-no-class", "F", "LAYER-4", "The encoder has no class loss.", forward=without(is_encoder, "loss_ce"))
add(
    "enc-no-boxes",
    "G",
    "LAYER-4",
    "The encoder has no box losses.",
    forward=after(lambda s, r, o, t: {k: v for k, v in r.items() if not is_encoder(k) or k.startswith("loss_ce")}),
)
add(
    "enc-as-aux",
    SIGMOID,
    "LAYER-4 KEY-1",
    "The encoder's losses carry the next auxiliary number.",
    layers=encoder_suffix(lambda e: f"_{len(aux_of(e))}"),
)
add("enc-suffix-encoder", "F", "LAYER-4 KEY-1", "Suffix `_encoder`.", layers=encoder_suffix(lambda e: "_encoder"))
add("enc-suffix-twice", "G", "LAYER-4 KEY-1", "Suffix `_enc_0`.", layers=encoder_suffix(lambda e: "_enc_0"))
add(
    "enc-only-with-aux",
    "F",
    "LAYER-4 KEY-3",
    "Encoder outputs are trained only beside auxiliary layers.",
    layers=layers(lambda s, e, o, t: e if o.get("aux_outputs") else [x for x in e if x[1] != "_enc"]),
)
add(
    "enc-zeroes-callers-labels",
    "F",
    "PURE-1 LAYER-4",
    "The caller's labels are set to 0.",
    encoder_targets=lambda s, t: [x["labels"].zero_() for x in t] and t,
)
add(
    "mask-not-for-aux",
    "G",
    "LAYER-6",
    "Auxiliary layers have no text mask.",
    with_mask=lambda s, a, o, k: Grounding.with_mask(s, a, o, k) if not is_aux(k or "x") else dict(a),
)
add(
    "mask-not-for-enc",
    "G",
    "LAYER-6",
    "Encoder outputs have no text mask.",
    with_mask=lambda s, a, o, k: Grounding.with_mask(s, a, o, k) if k != "_enc" else dict(a),
)
add(
    "mask-not-for-final",
    "G",
    "TOKEN-2",
    "The final layer has no text mask.",
    with_mask=lambda s, a, o, k: (
        Grounding.with_mask(s, a, o, k) if k else {x: y for x, y in a.items() if x != "text_mask"}
    ),
)


# -- keys and weights ----------------------------------------------------------------------------------------
def renamed(change):
    return after(lambda s, r, o, t: {change(k): v for k, v in r.items()})


def both_renamed(change):
    return {"forward": renamed(change), "weights": lambda s: {change(k): v for k, v in Port.weights(s).items()}}


def weights(change):
    return lambda s: change(Port.weights(s), s)


def base_weights(change):
    return lambda s: change(s.o.ce_loss_coef, s.o.bbox_loss_coef, s.o.giou_loss_coef)


def named(ce, bbox, giou):
    return {"loss_ce": ce, "loss_bbox": bbox, "loss_giou": giou}


add(
    "key-loss-class",
    "DF",
    "KEY-1",
    "loss_class for loss_ce.",
    **both_renamed(lambda k: k.replace("loss_ce", "loss_class")),
)
add("key-loss-l1", "G", "KEY-1", "loss_l1 for loss_bbox.", **both_renamed(lambda k: k.replace("loss_bbox", "loss_l1")))
add(
    "key-loss-iou",
    "F",
    "KEY-1",
    "loss_iou for loss_giou.",
    **both_renamed(lambda k: k.replace("loss_giou", "loss_iou")),
)
add(
    "key-boxes-swapped",
    "DG",
    "KEY-1",
    "loss_bbox and loss_giou are exchanged.",
    forward=renamed(lambda k: k.replace("bbox", "*").replace("giou", "bbox").replace("*", "giou")),
)
add(
    "key-suffix-aux",
    "DF",
    "KEY-1 LAYER-1",
    "`_aux_{i}`.",
    **both_renamed(lambda k: "{}_aux_{}".format(*k.rsplit("_", 1)) if is_aux(k) else k),
)
add(
    "key-suffix-dot",
    "G",
    "KEY-1 LAYER-1",
    "`loss_ce.0`.",
    forward=renamed(lambda k: ".".join(k.rsplit("_", 1)) if is_aux(k) else k),
)
add(
    "key-suffix-prefix",
    "D",
    "KEY-1 LAYER-1",
    "`d0.loss_ce`, mmdet's prefix.",
    **both_renamed(lambda k: "d{1}.{0}".format(*k.rsplit("_", 1)) if is_aux(k) else k),
)
add(
    "key-suffix-bare",
    "F",
    "KEY-1 LAYER-1",
    "`loss_ce0`.",
    forward=renamed(lambda k: "".join(k.rsplit("_", 1)) if is_aux(k) else k),
)
add(
    "key-layer-overwrites",
    "G",
    "LAYER-1 KEY-1",
    "Auxiliary losses have no suffix and overwrite the final ones.",
    forward=lambda s, o, t: (
        lambda r: {k: r.get(f"{k}_{len(o.get('aux_outputs', [])) - 1}", v) for k, v in r.items() if not is_aux(k)}
    )(base(s).forward(s, o, t)),
)
add(
    "weight-last-aux-missing",
    ALL,
    "KEY-4",
    "The last auxiliary layer has no weight.",
    weights=weights(lambda w, s: {k: v for k, v in w.items() if not k.endswith(f"_{s.o.num_decoder_layers - 2}")}),
)
add(
    "weight-aux-missing",
    "DF",
    "KEY-4",
    "No auxiliary layer has a weight.",
    weights=weights(lambda w, s: {k: v for k, v in w.items() if not is_aux(k)}),
)
add(
    "weight-enc-missing",
    SIGMOID,
    "KEY-4",
    "The encoder has no weight.",
    weights=weights(lambda w, s: {k: v for k, v in w.items() if not is_encoder(k)}),
)
add(
    "weight-aux-one",
    "FG",
    "KEY-4",
    "Auxiliary losses weigh 1.",
    weights=weights(lambda w, s: {k: 1.0 if is_aux(k) else v for k, v in w.items()}),
)
add(
    "weight-aux-shared",
    "D",
    "KEY-4",
    "Auxiliary weights are divided by the number of layers.",
    weights=weights(lambda w, s: {k: v / s.o.num_decoder_layers if is_aux(k) else v for k, v in w.items()}),
)
add(
    "weight-enc-halved",
    "F",
    "KEY-4",
    "Encoder weights are halved.",
    weights=weights(lambda w, s: {k: v / 2 if is_encoder(k) else v for k, v in w.items()}),
)
add(
    "weight-enc-box-zero",
    "G",
    "KEY-4",
    "Encoder box losses weigh 0.",
    weights=weights(
        lambda w, s: {k: 0.0 if is_encoder(k) and "ce" not in k.split("_")[1] else v for k, v in w.items()}
    ),
)
add(
    "weight-box-swapped",
    "DG",
    "KEY-4",
    "bbox and giou weights are exchanged.",
    base_weights=base_weights(lambda c, b, g: named(c, g, b)),
)
add(
    "weight-giou-from-bbox",
    "F",
    "KEY-4",
    "giou takes bbox's weight.",
    base_weights=base_weights(lambda c, b, g: named(c, b, b)),
)
add(
    "weight-ce-always-one",
    "FG",
    "KEY-4",
    "loss_ce always weighs 1.",
    base_weights=base_weights(lambda c, b, g: named(1.0, b, g)),
)
add("weight-fixed", "D", "KEY-4", "1, 5, 2 whatever is configured.", base_weights=lambda s: named(1.0, 5.0, 2.0))
add(
    "weight-from-costs",
    ALL,
    "COST-7 KEY-4",
    "Weights are the matching's.",
    base_weights=lambda s: named(s.o.set_cost_class, s.o.set_cost_bbox, s.o.set_cost_giou),
)
add(
    "weight-rounded",
    "F",
    "KEY-4",
    "Weights are cut to integers.",
    base_weights=base_weights(lambda c, b, g: named(int(c), int(b), int(g))),
)
add(
    "weight-giou-missing",
    "G",
    "KEY-4",
    "loss_giou has no weight in any layer.",
    weights=weights(lambda w, s: {k: v for k, v in w.items() if "giou" not in k}),
)
add(
    "weight-aux-ce-missing",
    "G",
    "KEY-4",
    "Auxiliary class losses have no weight.",
    weights=weights(lambda w, s: {k: v for k, v in w.items() if not (is_aux(k) and k.startswith("loss_ce"))}),
)
add(
    "weighted-already",
    "DF",
    "KEY-5 KEY-6",
    "Losses are returned weighted, and weight_dict stays.",
    forward=after(lambda s, r, o, t: {k: v * s.weight_dict.get(k, 1) for k, v in r.items()}),
)


def logged(change, weight=None):
    """One more key beside the losses."""
    methods = {"forward": after(lambda s, r, o, t: r | change(s, r, o, t))}
    if weight:
        methods["weights"] = weights(lambda w, s: w | weight)
    return methods


def cardinality(o, t, grad=False):
    x = o["pred_logits"]
    sure = x.sigmoid().amax(-1).sum(1) if grad else (x.argmax(-1) != x.shape[-1] - 1).sum(1).float()
    return (sure - torch.tensor([float(len(i["labels"])) for i in t])).abs().sum() / max(len(t), 1)


add(
    "logged-with-weight",
    "DF",
    "KEY-5",
    "cardinality_error has a weight.",
    **logged(lambda s, r, o, t: {"cardinality_error": cardinality(o, t)}, {"cardinality_error": 1.0}),
)
add(
    "logged-with-gradient",
    "FD",
    "GRAD-4",
    "cardinality_error, a soft count, carries gradient.",
    **logged(lambda s, r, o, t: {"cardinality_error": cardinality(o, t, grad=True)}),
)
add(
    "logged-xy-with-gradient",
    "G",
    "GRAD-4",
    "loss_xy carries gradient.",
    **logged(lambda s, r, o, t: {"loss_xy": r["loss_bbox"] / 2}),
)
add(
    "logged-xy-with-weight",
    "G",
    "KEY-5",
    "loss_xy has a weight and so counts twice.",
    **logged(lambda s, r, o, t: {"loss_xy": r["loss_bbox"].detach() / 2}, {"loss_xy": 1.0}),
)
add(
    "logged-only-with-targets",
    "D",
    "KEY-3",
    "class_error appears only where something is matched.",
    **logged(lambda s, r, o, t: {"class_error": torch.tensor(50.0)} if total_of(t) else {}),
)
add(
    "key-only-when-positive",
    "F",
    "KEY-3",
    "A loss of 0 is left out.",
    forward=after(lambda s, r, o, t: {k: v for k, v in r.items() if float(v.detach()) != 0}),
)
add("loss-shape-one", "DG", "KEY-2", "Losses have shape [1].", forward=each(lambda k, v: v.reshape(1)))
add("loss-python-float", "F", "KEY-2 GRAD-5", "Losses are python floats.", forward=each(lambda k, v: v.item()))
add("loss-numpy", "D", "KEY-2 GRAD-5", "Losses are numpy scalars.", forward=each(lambda k, v: v.detach().numpy()))
add(
    "loss-per-image",
    "F",
    "KEY-2",
    "loss_ce has one entry an image.",
    forward=after(
        lambda s, r, o, t: {
            k: v.expand(max(len(t), 2)) / max(len(t), 2) if k.startswith("loss_ce") else v for k, v in r.items()
        }
    ),
)
add(
    "loss-bool",
    "G",
    "KEY-2",
    "loss_giou of the final layer is an integer.",
    forward=each(lambda k, v: v.detach().long() if k == "loss_giou" else v),
)
add(
    "loss-total-only",
    "D",
    "KEY-1",
    "Only a weighted total is returned, as loss.",
    forward=after(lambda s, r, o, t: {"loss": sum(v * s.weight_dict[k] for k, v in r.items() if k in s.weight_dict)}),
)


# -- gradients -----------------------------------------------------------------------------------------------
class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class ClipGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-ctx.limit, ctx.limit), None


def inputs(change):
    """Pass every layer's predictions through something whose value is the same."""
    return lambda s, layer: change(base(s).up(s, layer))


def through(key, function):
    return inputs(lambda layer: {**layer, key: function(layer[key])})


def both(function):
    return inputs(lambda layer: {**layer, **{k: function(layer[k]) for k in ("pred_logits", "pred_boxes")}})


def no_graph(s, outputs, targets):
    with torch.no_grad():
        return base(s).forward(s, outputs, targets)


def pull_unmatched(s, layer, targets, indices, nb):
    """Unmatched boxes shrink by a little; the value hardly moves."""
    right = Port.loss_boxes(s, layer, targets, indices, nb)
    free = torch.ones(layer["pred_boxes"].shape[:2])
    free[s.where(indices)] = 0
    shrink = (layer["pred_boxes"][..., 2:] * free[..., None]).sum()
    return right | {"loss_bbox": right["loss_bbox"] + 0.001 * (shrink - shrink.detach())}


def unmatched_pulled_for_real(s, layer, targets, indices, nb):
    """Unmatched boxes are compared with the nearest target at a weight of 0.01."""
    right = Port.loss_boxes(s, layer, targets, indices, nb)
    extra = 0.0
    for b, t in enumerate(targets):
        if len(t["boxes"]):
            free = torch.ones(layer["pred_boxes"].shape[1], dtype=torch.bool)
            free[indices[b][0]] = False
            extra = extra + s.cost_l1(layer["pred_boxes"][b][free], t["boxes"]).amin(1).sum()
    return right | {"loss_bbox": right["loss_bbox"] + 0.01 * extra / nb}


def class_moves_boxes(s, layer, targets, indices, nb):
    """The class loss is weighted by the (undetached) mean overlap divided by itself."""
    right = base(s).loss_labels(s, layer, targets, indices, nb)["loss_ce"]
    p = layer["pred_boxes"][s.where(indices)]
    quality = 1 + s.pair_giou(p, s.gather("boxes", targets, indices, p)).sum()
    return {"loss_ce": right + 0.1 * (quality - quality.detach())}


def first_boxes_only(s, layer, targets, indices, nb):
    keep = torch.ones(layer["pred_boxes"].shape[:2])
    keep[:, 0] = 0
    boxes = layer["pred_boxes"] * keep[..., None] + (layer["pred_boxes"] * (1 - keep[..., None])).detach()
    return Port.loss_boxes(s, {**layer, "pred_boxes": boxes}, targets, indices, nb)


def empty_images_out(s, outputs, targets):
    """Images without targets are dropped before anything else."""
    keep = torch.tensor([len(t["labels"]) > 0 for t in targets], dtype=torch.bool)
    if not keep.any():
        return base(s).forward(s, outputs, targets)

    def cut(layer):
        return {k: v[keep] if isinstance(v, torch.Tensor) else v for k, v in layer.items()}

    small = cut(outputs)
    if "aux_outputs" in outputs:
        small["aux_outputs"] = [cut(a) for a in outputs["aux_outputs"]]
    if "enc_outputs" in outputs:
        small["enc_outputs"] = cut(outputs["enc_outputs"])
    return base(s).forward(s, small, [t for t in targets if len(t["labels"])])


add("no-gradient", "DF", "GRAD-1 GRAD-2 GRAD-5", "Losses are computed under no_grad.", forward=no_graph)
add("boxes-detached", "G", "GRAD-1 GRAD-5", "Boxes get no gradient.", up=through("pred_boxes", lambda x: x.detach()))
add("logits-detached", "F", "GRAD-2 GRAD-5", "Logits get no gradient.", up=through("pred_logits", lambda x: x.detach()))
add(
    "gradient-sign",
    "DG",
    "GRAD-6 GRAD-1",
    "The box gradient points the wrong way.",
    up=through("pred_boxes", lambda x: ScaleGradient.apply(x, -1.0)),
)
add(
    "gradient-halved",
    "F",
    "GRAD-2",
    "The class gradient is halved.",
    up=through("pred_logits", lambda x: ScaleGradient.apply(x, 0.5)),
)
add(
    "gradient-ninety-five",
    "D",
    "GRAD-1",
    "The box gradient is 5 % small.",
    up=through("pred_boxes", lambda x: ScaleGradient.apply(x, 0.95)),
)
add(
    "gradient-clipped",
    "FG",
    "GRAD-1 GRAD-2",
    "Gradients are clipped at 0.05 an entry.",
    up=both(lambda x: ClipGradient.apply(x, 0.05)),
)
add("gradient-leaks-to-unmatched", "DG", "GRAD-1", "Unmatched boxes get a small gradient.", loss_boxes=pull_unmatched)
add(
    "unmatched-pulled",
    "F",
    "GRAD-1 NORM-1",
    "Unmatched boxes are pulled to their nearest target.",
    loss_boxes=unmatched_pulled_for_real,
)
add(
    "class-loss-moves-boxes",
    "F",
    "GRAD-1",
    "The class loss sends gradient to the boxes.",
    loss_labels=class_moves_boxes,
)
add("first-query-without-gradient", "D", "GRAD-1", "Query 0 gets no box gradient.", loss_boxes=first_boxes_only)
add(
    "empty-images-dropped",
    "DFG",
    "GRAD-2 CLS-3 CLS-1",
    "Images without targets are dropped from the batch.",
    forward=empty_images_out,
)
add(
    "giou-gradient-off",
    "D",
    "GRAD-1",
    "loss_giou is a constant.",
    forward=each(lambda k, v: v.detach() + 0 * v if k.startswith("loss_giou") else v),
)
add(
    "boxes-rounded",
    "F",
    "NUM-1 GRAD-1",
    "Boxes are rounded to 1/1024 with a straight-through gradient.",
    up=through("pred_boxes", lambda x: x + ((x * 1024).round() / 1024 - x).detach()),
)
add(
    "logits-rounded",
    "G",
    "NUM-1",
    "Logits pass through bfloat16.",
    up=through("pred_logits", lambda x: x.bfloat16().float()),
)
add(
    "losses-rounded",
    "D",
    "NUM-1",
    "Losses are rounded to three decimals.",
    forward=each(lambda k, v: v + ((v * 1000).round() / 1000 - v).detach()),
)
add("losses-half", "G", "NUM-1", "Losses pass through float16.", forward=each(lambda k, v: v.half().float()))
add("losses-clamped", "F", "NUM-1 NUM-2", "Losses are clamped at 10.", forward=each(lambda k, v: v.clamp(max=10)))
add(
    "logits-nan-cleaned",
    "D",
    "NUM-2 NUM-1",
    "Logits beyond ±50 become 0.",
    up=through("pred_logits", lambda x: torch.where(x.abs() < 50, x, 0)),
)


# -- side effects --------------------------------------------------------------------------------------------
def before(change):
    """Do something to the caller's inputs first."""

    def forward(s, outputs, targets):
        with torch.no_grad():
            change(s, outputs, targets)
        return base(s).forward(s, outputs, targets)

    return forward


def afterwards(change):
    def forward(s, outputs, targets):
        losses = base(s).forward(s, outputs, targets)
        with torch.no_grad():
            change(s, outputs, targets)
        return losses

    return forward


def to_corners_in_place(s, outputs, targets):
    for t in targets:
        t["boxes"].copy_(s.corners(t["boxes"]))


def replace_corners(s, outputs, targets):
    for t in targets:
        t["boxes"] = s.corners(t["boxes"])


def sort_targets(s, outputs, targets):
    for t in targets:
        order = t["labels"].argsort(descending=True)
        for key in ("labels", "boxes", "token_labels"):
            if key in t:
                t[key] = t[key][order]


def mask_aux(s, outputs, targets):
    for a in outputs.get("aux_outputs", []):
        a["text_mask"] = outputs["text_mask"]


def last_mask_on(s, outputs, targets):
    outputs["text_mask"] = outputs["text_mask"].clone()
    outputs["text_mask"][:, -1] = True


def fill_infinite(s, outputs, targets):
    x = outputs["pred_logits"]
    x.data.masked_fill_(torch.isinf(x), -1e6)


def cached_number(s, outputs, targets):
    s._nb = getattr(s, "_nb", None) or Port.number(s, outputs, targets)
    return s._nb


def cached_pairs(s, layer, targets):
    """Pairs are kept for the next call with equally many targets."""
    key = (tuple(layer["pred_logits"].shape), tuple(len(t["labels"]) for t in targets))
    store = s.__dict__.setdefault("_store", {})
    return store.setdefault(key, Port.match(s, layer, targets))


def smoothed_number(s, outputs, targets):
    s._nb = 0.9 * getattr(s, "_nb", Port.number(s, outputs, targets)) + 0.1 * Port.number(s, outputs, targets)
    return s._nb


def warming(s, losses, outputs, targets):
    s._calls = getattr(s, "_calls", 0) + 1
    return {k: v * min(1.0, 0.9 + 0.05 * s._calls) for k, v in losses.items()}


def first_targets_kept(s, outputs, targets):
    s._first = getattr(s, "_first", None) or [t["boxes"].clone() for t in targets]
    if [b.shape for b in s._first] == [t["boxes"].shape for t in targets]:
        targets = [{**t, "boxes": b} for t, b in zip(targets, s._first, strict=True)]
    return base(s).forward(s, outputs, targets)


def accumulated(s, losses, outputs, targets):
    s._sum = {k: v + getattr(s, "_sum", {}).get(k, 0.0) for k, v in losses.items()}
    out, s._sum = s._sum, {k: v.detach() for k, v in s._sum.items()}
    return out


def dropout(s, layer):
    wide = base(s).up(s, layer)
    return {**wide, "pred_logits": torch.nn.functional.dropout(wide["pred_logits"], 0.05)}


def reseeded(s, outputs, targets):
    torch.manual_seed(0)
    return base(s).forward(s, outputs, targets)


def consumes(s, outputs, targets):
    torch.randperm(4)
    return base(s).forward(s, outputs, targets)


def jitter_in_training(s, layer):
    wide = base(s).up(s, layer)
    return {**wide, "pred_boxes": wide["pred_boxes"] * 0.99} if s.training else wide


def sampled_negatives(s, cells, indices, layer):
    """A random half of all cells, doubled."""
    return 2 * (cells * (torch.rand_like(cells) < 0.5)).sum()


def weights_shared(s, outputs, targets):
    s.weight_dict["loss_ce"] = s.weight_dict["loss_ce"] * 0.999


add(
    "outputs-gain-key",
    "DG",
    "PURE-1",
    "outputs gains one_hot.",
    forward=afterwards(lambda s, o, t: o.update(one_hot=torch.zeros(1))),
)
add("aux-gain-mask", "G", "PURE-1", "Auxiliary outputs gain text_mask.", forward=afterwards(mask_aux))
add(
    "aux-popped",
    "F",
    "PURE-1",
    "aux_outputs is taken out of the caller's dict.",
    forward=afterwards(lambda s, o, t: o.pop("aux_outputs", None)),
)
add(
    "aux-list-extended",
    "D",
    "PURE-1",
    "aux_outputs gains the final layer.",
    forward=afterwards(
        lambda s, o, t: o.get("aux_outputs", []).append({k: o[k] for k in ("pred_logits", "pred_boxes")})
    ),
)
add(
    "targets-to-corners-in-place",
    ALL,
    "PURE-1 PURE-2",
    "Target boxes become corners in place, after the call.",
    forward=afterwards(to_corners_in_place),
)
add("targets-replaced", "F", "PURE-1", "Target dicts get corner boxes.", forward=afterwards(replace_corners))
add(
    "targets-sorted",
    "DG",
    "PURE-1",
    "Targets are sorted by label in the caller's dicts.",
    forward=afterwards(sort_targets),
)
add(
    "targets-gain-key",
    "F",
    "PURE-1",
    "Targets gain an area.",
    forward=afterwards(lambda s, o, t: [x.update(area=x["boxes"][:, 2]) for x in t]),
)
add(
    "targets-list-reversed",
    "D",
    "PURE-1",
    "The list of targets is reversed.",
    forward=afterwards(lambda s, o, t: t.reverse()),
)
add(
    "boxes-clamped-in-place",
    "F",
    "PURE-1",
    "Predicted boxes are clamped in place.",
    forward=afterwards(lambda s, o, t: o["pred_boxes"].data.clamp_(min=0.05, max=0.95)),
)
add("logits-filled-in-place", "G", "PURE-1", "Infinite logits are filled in place.", forward=afterwards(fill_infinite))
add(
    "mask-last-on",
    "G",
    "PURE-1 TOKEN-2",
    "The last text_mask entry is set in the caller's outputs.",
    forward=afterwards(last_mask_on),
)
add(
    "tokens-normalised-in-place",
    "G",
    "PURE-1",
    "token_labels are normalised in place.",
    forward=afterwards(lambda s, o, t: [x["token_labels"].div_(x["token_labels"].sum(-1, keepdim=True)) for x in t]),
)
add("caches-number", "DF", "PURE-2", "nb is computed once for all calls.", number=cached_number)
add("caches-pairs", "FG", "PURE-2 MATCH-9", "Pairs are reused in later calls of the same shape.", match=cached_pairs)
add("caches-first-targets", "D", "PURE-2", "Target boxes of the first call are kept.", forward=first_targets_kept)
add("smooths-number", "G", "PURE-2", "nb is a running mean.", number=smoothed_number)
add("warms-up", "DF", "PURE-2", "Losses grow over the first calls.", forward=after(warming))
add("accumulates", "G", "PURE-2", "Losses add up over calls.", forward=after(accumulated))
add("dropout", "FD", "PURE-2 PURE-3", "Dropout on the logits.", up=dropout)
add("samples-negatives", "G", "PURE-2 PURE-3", "A random half of the cells is used.", sum_cells=sampled_negatives)
add("reseeds", "DF", "PURE-3", "The global generator is reseeded.", forward=reseeded)
add("consumes-random", "G", "PURE-3", "The global generator is moved.", forward=consumes)
add("weights-drift", "F", "PURE-2 KEY-4", "weight_dict changes with every call.", forward=before(weights_shared))
add("train-differs", "DG", "PURE-4", "train() scales the boxes.", up=jitter_in_training)
add(
    "eval-without-aux",
    "F",
    "PURE-4 LAYER-1",
    "eval() leaves auxiliary layers out.",
    layers=layers(lambda s, e, o, t: e if s.training else others(e)),
)
add(
    "aux-only-in-eval",
    "D",
    "PURE-4 LAYER-1",
    "train() leaves auxiliary layers out.",
    layers=layers(lambda s, e, o, t: others(e) if s.training else e),
)


# -- refusals ------------------------------------------------------------------------------------------------
def lenient(s, outputs, targets):
    """No checks; labels are wrapped and lengths are cut, so that nothing raises."""


def wrapped_labels(s, targets, like):
    found = base(s).clean(s, targets, like)
    return [{**t, "labels": t["labels"] % max(s.o.num_classes, 1)} for t in found]


def positive_sides(s, targets, like):
    found = base(s).clean(s, targets, like)
    return [
        {**t, "boxes": torch.cat([t["boxes"][:, :2], t["boxes"][:, 2:].abs()], 1).nan_to_num(0.5, 1.0, 0.0)}
        for t in found
    ]


def cut_lengths(s, targets, like):
    found = base(s).clean(s, targets, like)
    return [{**t, **{k: t[k][: min(len(t["labels"]), len(t["boxes"]))] for k in ("labels", "boxes")}} for t in found]


add("bad-labels-wrap", "DF", "BAD-1", "Labels out of range wrap around.", check=lenient, clean=wrapped_labels)
add(
    "bad-boxes-repaired",
    "DG",
    "BAD-3",
    "Negative sides lose their sign, NaN becomes 0.5.",
    check=lenient,
    clean=positive_sides,
)
add("bad-lengths-cut", "DF", "BAD-2", "The longer of labels and boxes is cut.", check=lenient, clean=cut_lengths)
