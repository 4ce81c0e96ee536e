"""Mistakes of the class loss and of its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .port import SIGMOID, Deformable, Detr, Grounding, Registry

MISTAKES = Registry(globals())
add = MISTAKES.add


def labels_with(change):
    """loss_ce from the right one and its surroundings."""

    def loss_labels(s, layer, targets, indices, nb):
        right = type(s).__base__.loss_labels(s, layer, targets, indices, nb)["loss_ce"]
        return {"loss_ce": change(s, right, layer, targets, indices, nb)}

    return loss_labels


def matched_count(indices):
    return sum(len(q) for q, _ in indices)


# -- DETR's cross-entropy ------------------------------------------------------------------------------------
def class_weights(change):
    def class_weight(s, logits):
        w = Detr.class_weight(s, logits).clone()
        change(w, s.o.eos_coef)
        return w

    return class_weight


def set_at(*pairs):
    """Weights from (index, value of eos) pairs."""

    def change(w, eos):
        for index, value in pairs:
            w[index] = value(eos)

    return class_weights(change)


def classes_then(change):
    """Change the [B,Q] classes that the cross-entropy aims at."""

    def target_classes(s, logits, targets, indices):
        return change(s, Detr.target_classes(s, logits, targets, indices), logits, targets, indices)

    return target_classes


def unmatched_last_real(s, classes, logits, targets, indices):
    return torch.where(classes == logits.shape[-1] - 1, logits.shape[-1] - 2, classes)


def unmatched_first(s, classes, logits, targets, indices):
    return torch.where(classes == logits.shape[-1] - 1, 0, classes)


def labels_from_one(s, classes, logits, targets, indices):
    return torch.where(classes == logits.shape[-1] - 1, classes, (classes + 1).clamp(max=logits.shape[-1] - 2))


def labels_unpermuted(s, classes, logits, targets, indices):
    out = torch.full_like(classes, logits.shape[-1] - 1)
    for b, (q, _) in enumerate(indices):
        out[b, q] = targets[b]["labels"][: len(q)]
    return out


def last_class_is_background(s, classes, logits, targets, indices):
    return torch.where(classes == logits.shape[-1] - 2, logits.shape[-1] - 1, classes)


def first_class_is_background(s, classes, logits, targets, indices):
    return torch.where(classes == 0, logits.shape[-1] - 1, classes)


def first_label_for_all(s, classes, logits, targets, indices):
    for b, (q, _) in enumerate(indices):
        if len(q):
            classes[b, q] = targets[b]["labels"][0]
    return classes


def classes_of_first_queries(s, classes, logits, targets, indices):
    out = torch.full_like(classes, logits.shape[-1] - 1)
    for b, (_, t) in enumerate(indices):
        out[b, : len(t)] = targets[b]["labels"][t]
    return out


def means(change):
    return lambda s, nll, w, classes, nb: change(nll, w, classes, nb, s)


def weighted_total(nll, w):
    return (w * nll).sum()


def per_image_mean(nll, w, classes, nb, s):
    return ((w * nll).sum(1) / w.sum(1)).mean() if w.numel() else nll.sum()


def matched_only(nll, w, classes, nb, s):
    kept = nll[classes < s.o.num_classes]
    return kept.mean() if len(kept) else nll.sum() * 0


def separately(nll, w, classes, nb, s):
    """Matched and unmatched queries averaged apart, eos_coef between them."""
    hit = classes < s.o.num_classes
    fore = nll[hit].sum() / hit.sum().clamp(min=1)
    return fore + s.o.eos_coef * nll[~hit].sum() / (~hit).sum().clamp(min=1)


def smoothed(s, x, classes):
    log = x.log_softmax(-1)
    return 0.99 * Detr.nll(s, x, classes) - 0.01 * log.mean(-1)


def log_with_eps(eps):
    return lambda s, x, classes: -(x.softmax(-1).gather(-1, classes[..., None])[..., 0] + eps).log()


def sigmoid_ce(s, x, classes):
    hot = F.one_hot(classes, x.shape[-1]).to(x.dtype)
    return F.binary_cross_entropy_with_logits(x, hot, reduction="none").sum(-1)


def focal_softmax(s, x, classes):
    nll = Detr.nll(s, x, classes)
    return (1 - (-nll).exp()) ** 2 * nll


def real_channels_for_matched(s, x, classes):
    """Matched queries normalise over the K real channels alone."""
    real = torch.logsumexp(x[..., :-1], -1) - x.gather(-1, classes.clamp(max=x.shape[-1] - 2)[..., None])[..., 0]
    return torch.where(classes < x.shape[-1] - 1, real, Detr.nll(s, x, classes))


def unmatched_detached(s, x, classes):
    return Detr.nll(s, torch.where((classes < x.shape[-1] - 1)[..., None], x, x.detach()), classes)


def matched_background_detached(s, x, classes):
    return Detr.nll(s, torch.cat([x[..., :-1], x[..., -1:].detach()], -1), classes)


add(
    "ce-over-boxes",
    "D",
    "CLS-2 CLS-1",
    "Σ w·nll / nb.",
    mean_nll=means(lambda n, w, c, nb, s: weighted_total(n, w) / nb),
)
add(
    "ce-mean-over-boxes",
    "D",
    "CLS-2",
    "The weighted mean is divided by nb again.",
    mean_nll=means(lambda n, w, c, nb, s: weighted_total(n, w) / w.sum().clamp(min=1e-30) / nb),
)
add(
    "ce-plain-mean",
    "D",
    "CLS-1",
    "Σ w·nll / (B·Q).",
    mean_nll=means(lambda n, w, c, nb, s: (w * n).mean() if n.numel() else n.sum()),
)
add("ce-sum", "D", "CLS-1", "Σ w·nll.", mean_nll=means(lambda n, w, c, nb, s: weighted_total(n, w)))
add(
    "ce-image-mean",
    "D",
    "CLS-1",
    "A weighted mean an image, then the mean of the images.",
    mean_nll=means(per_image_mean),
)
add("ce-matched-only", "D", "CLS-1 GRAD-2", "Unmatched queries have no class loss.", mean_nll=means(matched_only))
add("ce-apart", "D", "CLS-1", "Matched and unmatched queries are averaged apart.", mean_nll=means(separately))
add(
    "ce-divisor-without-eos",
    "D",
    "CLS-1",
    "eos_coef weighs the sum, not the divisor.",
    mean_nll=means(lambda n, w, c, nb, s: weighted_total(n, w) / max(n.numel(), 1)),
)
add(
    "ce-divisor-matched",
    "D",
    "CLS-1",
    "Σ w·nll / number of matched pairs.",
    mean_nll=means(lambda n, w, c, nb, s: weighted_total(n, w) / max(int((c < s.o.num_classes).sum()), 1)),
)
add("ce-unweighted", "D", "CLS-1", "eos_coef is not used.", class_weight=set_at((-1, lambda e: 1.0)))
add("ce-eos-fixed", "D", "CLS-1", "eos_coef is 0.1 whatever is configured.", class_weight=set_at((-1, lambda e: 0.1)))
add("ce-eos-squared", "D", "CLS-1", "eos_coef is applied twice.", class_weight=set_at((-1, lambda e: e * e)))
add(
    "ce-eos-on-first",
    "D",
    "CLS-1 CLS-7",
    "eos_coef weighs class 0.",
    class_weight=set_at((-1, lambda e: 1.0), (0, lambda e: e)),
)
add(
    "ce-eos-on-last-real",
    "D",
    "CLS-1 CLS-7",
    "eos_coef weighs class K − 1.",
    class_weight=set_at((-1, lambda e: 1.0), (-2, lambda e: e)),
)
add(
    "ce-eos-on-real",
    "D",
    "CLS-1",
    "eos_coef weighs the real classes.",
    class_weight=class_weights(lambda w, e: w.copy_(torch.cat([torch.full_like(w[:-1], e), w[:1] * 0 + 1]))),
)
add("ce-eos-complement", "D", "CLS-1", "1 − eos_coef weighs no object.", class_weight=set_at((-1, lambda e: 1 - e)))
add(
    "ce-eos-also-on-last-real",
    "D",
    "CLS-7",
    "eos_coef weighs class K − 1 as well.",
    class_weight=set_at((-2, lambda e: e)),
)
add(
    "ce-background-last-real",
    "D",
    "CLS-1 CLS-7",
    "Unmatched queries aim at class K − 1.",
    target_classes=classes_then(unmatched_last_real),
)
add(
    "ce-background-first",
    "D",
    "CLS-1 CLS-7",
    "Unmatched queries aim at class 0.",
    target_classes=classes_then(unmatched_first),
)
add("ce-labels-from-one", "D", "CLS-1", "Labels are shifted by one.", target_classes=classes_then(labels_from_one))
add(
    "ce-labels-unpermuted",
    "D",
    "CLS-1",
    "Labels are taken in target order, not in matched order.",
    target_classes=classes_then(labels_unpermuted),
)
add(
    "ce-last-class-lost",
    "D",
    "CLS-7",
    "Class K − 1 trains as background.",
    target_classes=classes_then(last_class_is_background),
)
add(
    "ce-first-class-lost",
    "D",
    "CLS-7",
    "Class 0 trains as background.",
    target_classes=classes_then(first_class_is_background),
)
add(
    "ce-first-label",
    "D",
    "CLS-1",
    "Every matched query of an image gets its first label.",
    target_classes=classes_then(first_label_for_all),
)
add(
    "ce-first-queries",
    "D",
    "CLS-1",
    "The labels go to the first queries, not to the matched ones.",
    target_classes=classes_then(classes_of_first_queries),
)
add(
    "ce-ignore-first",
    "D",
    "CLS-7",
    "ignore_index = 0.",
    mean_nll=means(lambda n, w, c, nb, s: (w * n * (c != 0)).sum() / (w * (c != 0)).sum().clamp(min=1e-30)),
)
add("ce-label-smoothing", "D", "CLS-1", "Label smoothing of 0.01.", nll=smoothed)
add("ce-log-eps-1e-3", "D", "CLS-1 NUM-1", "1e-3 inside the logarithm.", nll=log_with_eps(1e-3))
add(
    "ce-log-eps-1e-8",
    "D",
    "CLS-1 NUM-2",
    "1e-8 inside the logarithm, which flattens wide logits.",
    nll=log_with_eps(1e-8),
)
add("ce-log-of-softmax", "D", "NUM-2", "log(softmax(x)), infinite for wide logits.", nll=log_with_eps(0.0))
add(
    "ce-double-softmax",
    "D",
    "CLS-1",
    "Cross-entropy of probabilities.",
    nll=lambda s, x, c: Detr.nll(s, x.softmax(-1), c),
)
add("ce-sigmoid", "D", "CLS-1", "Binary cross-entropy over the channels.", nll=sigmoid_ce)
add("ce-focal", "D", "CLS-1", "A focal factor on the softmax.", nll=focal_softmax)
add(
    "ce-real-channels",
    "D",
    "CLS-1",
    "Matched queries leave no object out of the softmax.",
    nll=real_channels_for_matched,
)
add("ce-temperature", "D", "CLS-1", "Logits are divided by 1.1.", nll=lambda s, x, c: Detr.nll(s, x / 1.1, c))
add(
    "ce-logits-clamped",
    "D",
    "CLS-1 NUM-1",
    "Logits are clamped at ±10.",
    nll=lambda s, x, c: Detr.nll(s, x.clamp(-10, 10), c),
)
add("ce-unmatched-detached", "D", "GRAD-2", "Unmatched queries get no class gradient.", nll=unmatched_detached)
add(
    "ce-background-channel-detached",
    "D",
    "GRAD-2",
    "The no-object channel gets no gradient.",
    nll=matched_background_detached,
)
add("ce-squared", "D", "CLS-1", "nll².", nll=lambda s, x, c: Detr.nll(s, x, c) ** 2)


# -- focal: sums and divisors --------------------------------------------------------------------------------
def sums(change):
    return lambda s, cells, indices, layer: change(cells)


def divisors(change):
    return lambda s, nb, indices, layer: change(nb, indices, layer["pred_logits"])


def only_matched_rows(s, cells, indices, layer):
    return cells[s.where(indices)].sum()


def hard_negatives(s, cells, indices, layer):
    """Three hardest unmatched queries a matched one."""
    matched = torch.zeros(cells.shape[:2], dtype=torch.bool)
    matched[s.where(indices)] = True
    rows = cells.sum(-1)
    rest = rows[~matched].sort(descending=True).values
    return rows[matched].sum() + rest[: max(3 * int(matched.sum()), 1)].sum()


def image_means(s, cells, indices, layer):
    counts = torch.tensor([max(len(q), 1) for q, _ in indices], dtype=cells.dtype)
    return (cells.sum((1, 2)) / counts).sum() if len(indices) else cells.sum()


def empties_left_out(s, cells, indices, layer):
    return sum((cells[b].sum() for b, (q, _) in enumerate(indices) if len(q)), cells.sum() * 0)


def unmatched_scaled(s, cells, indices, layer):
    """eos_coef's habit: unmatched queries weigh 0.1."""
    return only_matched_rows(s, cells, indices, layer) * 0.9 + cells.sum() * 0.1


add(
    "focal-matched-only",
    SIGMOID,
    "CLS-3 GRAD-2 TOKEN-1",
    "Unmatched queries have no class loss.",
    sum_cells=only_matched_rows,
)
add(
    "focal-mean-queries",
    SIGMOID,
    "CLS-6",
    "The mean over queries (× Q forgotten).",
    sum_cells=sums(lambda c: c.sum() / max(c.shape[1], 1)),
)
add("focal-mean-channels", SIGMOID, "CLS-6", "The mean over channels.", sum_cells=sums(lambda c: c.mean(-1).sum()))
add(
    "focal-mean",
    SIGMOID,
    "CLS-6",
    "The mean over everything.",
    sum_cells=sums(lambda c: c.mean() if c.numel() else c.sum()),
)
add(
    "focal-mean-images",
    "F",
    "CLS-6 NORM-2",
    "The mean over images.",
    sum_cells=sums(lambda c: c.sum() / max(len(c), 1)),
)
add(
    "focal-times-channels",
    "F",
    "CLS-6",
    "The mean over queries times the number of channels.",
    sum_cells=sums(lambda c: c.sum() * c.shape[2] / max(c.shape[1], 1)),
)
add(
    "focal-largest-channel",
    "G",
    "CLS-6 GRAD-2",
    "Each query's largest cell.",
    sum_cells=sums(lambda c: c.amax(-1).sum() if c.numel() else c.sum()),
)
add("focal-hard-negatives", "F", "CLS-3", "Three hard negatives a positive.", sum_cells=hard_negatives)
add(
    "focal-image-norm",
    SIGMOID,
    "CLS-3 NORM-2",
    "Each image is divided by its own count first.",
    sum_cells=image_means,
    class_divisor=divisors(lambda nb, i, x: 1.0),
)
add(
    "focal-empty-images-left-out",
    SIGMOID,
    "CLS-8 CLS-3",
    "Images without targets have no class loss.",
    sum_cells=empties_left_out,
)
add("focal-unmatched-weigh-less", "F", "CLS-3", "Unmatched queries weigh 0.1.", sum_cells=unmatched_scaled)
add("focal-undivided", "F", "CLS-3", "No divisor.", class_divisor=divisors(lambda nb, i, x: 1.0))
add(
    "focal-over-matches",
    "F",
    "CLS-3 NORM-3",
    "The divisor counts matched pairs.",
    class_divisor=divisors(lambda nb, i, x: max(matched_count(i), 1)),
)
add(
    "focal-over-queries",
    "G",
    "CLS-3 NORM-3",
    "The divisor counts queries.",
    class_divisor=divisors(lambda nb, i, x: max(x.shape[0] * x.shape[1], 1)),
)
add(
    "focal-over-images",
    "F",
    "CLS-3 NORM-3",
    "The divisor counts images.",
    class_divisor=divisors(lambda nb, i, x: max(len(x), 1)),
)
add("focal-divided-twice", "G", "CLS-3", "Divided by nb twice.", class_divisor=divisors(lambda nb, i, x: nb * nb))
add(
    "focal-none-without-targets",
    SIGMOID,
    "CLS-8",
    "Zero where the batch has no target.",
    loss_labels=labels_with(lambda s, r, layer, t, i, nb: r if sum(len(x["labels"]) for x in t) else r * 0),
)
add(
    "ce-none-without-targets",
    "D",
    "CLS-8",
    "Zero where the batch has no target.",
    loss_labels=labels_with(lambda s, r, layer, t, i, nb: r if sum(len(x["labels"]) for x in t) else r * 0),
)
add(
    "ce-other-formula-without-targets",
    "DF",
    "CLS-8",
    "Triple where the batch has no target.",
    loss_labels=labels_with(lambda s, r, layer, t, i, nb: r if sum(len(x["labels"]) for x in t) else 3 * r),
)


# -- focal: one cell -----------------------------------------------------------------------------------------
def cells(change):
    """The focal cell from x, y, α, γ."""
    return lambda s, x, hot: change(x, hot, s.alpha(), s.gamma())


def probability(change):
    return lambda s, x, hot: s.alpha_t(hot) * change(x.sigmoid(), hot, s.gamma()) * s.bce(x, hot)


def softmax_cell(s, x, hot):
    p = x.softmax(-1)
    p_t = p * hot + (1 - p) * (1 - hot)
    return s.alpha_t(hot) * (1 - p_t) ** s.gamma() * -(p_t + 1e-8).log()


def varifocal(s, x, hot):
    p = x.sigmoid()
    return (s.alpha() * p.detach() ** s.gamma() * (1 - hot) + hot) * s.bce(x, hot)


def quality(s, x, hot):
    return (hot - x.sigmoid()).abs() ** s.gamma() * s.bce(x, hot)


def log_eps(eps):
    def bce(s, x, hot):
        p = x.sigmoid()
        return -hot * (p + eps).log() - (1 - hot) * (1 - p + eps).log()

    return bce


def clamped_probability(s, x, hot):
    return F.binary_cross_entropy(x.sigmoid().clamp(1e-4, 1 - 1e-4), hot, reduction="none")


def kinked(s, x, hot):
    """max(x, 0) − x·y + log1p(exp(−|x|)), right but for its gradient at x = 0."""
    return x.clamp(min=0) - x * hot + (-x.abs()).exp().log1p()


def smoothed_hot(s, x, hot):
    return Deformable.bce(s, x, hot * 0.99 + 0.005)


add("alpha-swapped", SIGMOID, "CLS-4", "1 − α weighs positives.", alpha=lambda s: 1 - s.o.focal_alpha)
add("alpha-off", SIGMOID, "CLS-4", "No α.", alpha_t=lambda s, hot: torch.ones_like(hot))
add(
    "alpha-everywhere",
    "F",
    "CLS-4",
    "α weighs negatives as well.",
    alpha_t=lambda s, hot: torch.full_like(hot, s.alpha()),
)
add("alpha-positives-only", "G", "CLS-4", "Negatives weigh 1.", alpha_t=lambda s, hot: s.alpha() * hot + (1 - hot))
add("alpha-fixed", SIGMOID, "CLS-4", "α = 0.25 whatever is configured.", alpha=lambda s: 0.25)
add("alpha-0-26", "F", "CLS-4", "α is 4 % too large.", alpha=lambda s: 1.04 * s.o.focal_alpha)
add(
    "alpha-twice-one-minus",
    "G",
    "CLS-4",
    "2α(y) + 2(1 − α)(1 − y).",
    alpha_t=lambda s, hot: 2 * Deformable.alpha_t(s, hot),
)
add("gamma-off", SIGMOID, "CLS-5", "No modulation.", gamma=lambda s: 0.0)
add("gamma-fixed", SIGMOID, "CLS-5", "γ = 2 whatever is configured.", gamma=lambda s: 2.0)
add("gamma-1-9", "G", "CLS-5", "γ is 0.95 of what it should be.", gamma=lambda s: 0.95 * s.o.focal_gamma)
add(
    "gamma-of-alpha",
    "F",
    "CLS-5 CLS-4",
    "α and γ arrive in each other's place.",
    gamma=lambda s: s.o.focal_alpha,
    alpha=lambda s: s.o.focal_gamma,
)
add(
    "modulation-detached",
    SIGMOID,
    "CLS-5 GRAD-2",
    "No gradient through (1 − p_t)^γ.",
    modulation=lambda s, miss: Deformable.modulation(s, miss).detach(),
)
add("modulation-of-hit", "F", "CLS-5", "p_t^γ.", modulation=lambda s, miss: (1 - miss) ** s.gamma())
add(
    "modulation-positives-only",
    "G",
    "CLS-5",
    "Negatives are not modulated.",
    focal=probability(lambda p, y, g: y * (1 - p) ** g + (1 - y)),
)
add(
    "modulation-negatives-only",
    "F",
    "CLS-5",
    "Positives are not modulated.",
    focal=probability(lambda p, y, g: y + (1 - y) * p**g),
)
add(
    "modulation-of-p", "G", "CLS-5", "(1 − p)^γ for negatives as well.", focal=probability(lambda p, y, g: (1 - p) ** g)
)
add(
    "modulation-from-bce",
    "F",
    "CLS-5",
    "p_t = exp(−α_t·bce): α inside the modulation.",
    focal=lambda s, x, y: s.alpha_t(y) * (1 - (-s.alpha_t(y) * s.bce(x, y)).exp()) ** s.gamma() * s.bce(x, y),
)
add("modulation-times-gamma", "F", "CLS-5", "γ·(1 − p_t).", modulation=lambda s, miss: s.gamma() * miss)
add(
    "modulation-floor",
    "G",
    "CLS-5",
    "1 − p_t is at least 0.05.",
    modulation=lambda s, miss: miss.clamp(min=0.05) ** s.gamma(),
)
add("focal-softmax", SIGMOID, "CLS-3 TOKEN-1", "Softmax probabilities.", focal=softmax_cell)
add("focal-is-varifocal", "F", "CLS-3 CLS-4", "Varifocal weights with hard targets.", focal=varifocal)
add("focal-is-quality", "G", "CLS-4", "Quality focal loss, without α.", focal=quality)
add(
    "focal-is-mse", "F", "CLS-3", "Squared error in place of the logarithm.", bce=lambda s, x, y: (x.sigmoid() - y) ** 2
)
add(
    "focal-hinge",
    "G",
    "CLS-3 TOKEN-1",
    "Hinge in place of the logarithm.",
    bce=lambda s, x, y: (1 - x * (2 * y - 1)).clamp(min=0),
)
add("focal-log-eps-1e-8", SIGMOID, "NUM-2 NUM-1", "log(p + 1e-8) flattens wide logits.", bce=log_eps(1e-8))
add("focal-log-eps-1e-3", "F", "CLS-3 NUM-1", "1e-3 inside the logarithms.", bce=log_eps(1e-3))
add(
    "focal-log-of-sigmoid",
    SIGMOID,
    "NUM-2",
    "log(σ(x)), infinite for wide logits.",
    bce=lambda s, x, y: -y * x.sigmoid().log() - (1 - y) * (1 - x.sigmoid()).log(),
)
add("focal-probability-clamped", "G", "NUM-1 GRAD-2", "p is clamped to 1e-4 … 1 − 1e-4.", bce=clamped_probability)
add(
    "focal-logits-clamped",
    "F",
    "NUM-1 CLS-3",
    "Logits are clamped at ±10.",
    focal=lambda s, x, y: Deformable.focal(s, x.clamp(-10, 10), y),
)
add(
    "focal-log-base-2",
    "G",
    "CLS-3",
    "Binary logarithms.",
    bce=lambda s, x, y: Deformable.bce(s, x, y) / 0.6931471805599453,
)
add(
    "focal-on-probabilities",
    "F",
    "CLS-3",
    "The sigmoid is applied twice.",
    bce=lambda s, x, y: Deformable.bce(s, x.sigmoid(), y),
)
add("focal-kink-at-zero", SIGMOID, "GRAD-2", "The gradient at a logit of exactly 0 is one-sided.", bce=kinked)
add("focal-label-smoothing", SIGMOID, "CLS-3 TOKEN-1", "Label smoothing of 0.01.", bce=smoothed_hot)
add(
    "focal-positives-only",
    "F",
    "CLS-3",
    "Negative cells have no loss.",
    focal=lambda s, x, y: y * Deformable.focal(s, x, y),
)
add(
    "focal-negatives-only",
    "F",
    "CLS-3",
    "Positive cells have no loss.",
    focal=lambda s, x, y: (1 - y) * Deformable.focal(s, x, y),
)
add(
    "focal-negatives-halved",
    "G",
    "CLS-3 CLS-4",
    "Negative cells weigh half.",
    focal=lambda s, x, y: (1 + y) / 2 * Deformable.focal(s, x, y),
)
add(
    "focal-bfloat16",
    "DF"[1:],
    "NUM-1",
    "Computed in bfloat16.",
    focal=lambda s, x, y: Deformable.focal(s, x.bfloat16(), y.bfloat16()).float(),
)
add(
    "ce-float16",
    "D",
    "NUM-1",
    "Computed in float16.",
    nll=lambda s, x, c: Detr.nll(s, x.half().float(), c).half().float(),
)


# -- focal: targets ------------------------------------------------------------------------------------------
def hot_then(change):
    """Change the [B,Q,C] 0/1 targets."""

    def one_hot(s, logits, targets, indices):
        return change(s, type(s).__base__.one_hot(s, logits, targets, indices), logits, targets, indices)

    return one_hot


def zero_channel(index):
    def change(s, hot, logits, targets, indices):
        hot = hot.clone()
        hot[..., index] = 0
        return hot

    return hot_then(change)


def unpermuted(s, hot, logits, targets, indices):
    key = [(q, torch.arange(len(q))) for q, _ in indices]
    return type(s).__base__.one_hot(s, logits, targets, key)


def first_queries(s, hot, logits, targets, indices):
    return type(s).__base__.one_hot(s, logits, targets, [(torch.arange(len(t)), t) for _, t in indices])


def shifted(step):
    return hot_then(lambda s, hot, logits, targets, indices: hot.roll(step, -1))


def union_of_image(s, hot, logits, targets, indices):
    """Every matched query aims at all classes of its image."""
    return torch.where(hot.any(-1, keepdim=True), hot.amax(1, keepdim=True), hot)


def unmatched_get_last(s, hot, logits, targets, indices):
    hot = hot.clone()
    hot[..., -1] = torch.where(hot.any(-1), hot[..., -1], 1.0)
    return hot


def next_image(s, hot, logits, targets, indices):
    return hot.roll(1, 0)


def iou_target(s, hot, logits, targets, indices):
    return hot * 0.8


add(
    "hot-last-class-lost",
    "F",
    "CLS-7",
    "Class K − 1 has no positive (dropped with the padding column).",
    one_hot=zero_channel(-1),
)
add("hot-first-class-lost", "F", "CLS-7", "Class 0 has no positive.", one_hot=zero_channel(0))
add("hot-shifted", "F", "CLS-3 CLS-7", "Labels are shifted up by one.", one_hot=shifted(1))
add("hot-shifted-down", "F", "CLS-3 CLS-7", "Labels are shifted down by one.", one_hot=shifted(-1))
add(
    "hot-unpermuted",
    SIGMOID,
    "CLS-3 TOKEN-1",
    "Classes in target order, not in matched order.",
    one_hot=hot_then(unpermuted),
)
add("hot-first-queries", SIGMOID, "CLS-3 TOKEN-1", "Classes go to the first queries.", one_hot=hot_then(first_queries))
add(
    "hot-image-union",
    "FG",
    "CLS-3 TOKEN-1",
    "Matched queries aim at all classes of their image.",
    one_hot=hot_then(union_of_image),
)
add(
    "hot-unmatched-last",
    "F",
    "CLS-3",
    "Unmatched queries are positives of the last channel.",
    one_hot=hot_then(unmatched_get_last),
)
add(
    "hot-next-image",
    "FG",
    "CLS-3 TOKEN-4",
    "Class targets come from the neighbouring image.",
    one_hot=hot_then(next_image),
)
add(
    "hot-soft",
    "F",
    "CLS-3",
    "Positives aim at 0.8.",
    one_hot=hot_then(iou_target),
    miss=lambda s, x, y: (x * (1 - 2 * (y > 0).to(x.dtype))).sigmoid(),
)


# -- tokens --------------------------------------------------------------------------------------------------
def soft_miss(s, x, y):
    """1 − p_t for targets that are not 0 or 1."""
    return x.sigmoid() * (1 - y) + (1 - x.sigmoid()) * y


def first_token(s, hot, logits, targets, indices):
    return torch.zeros_like(hot).scatter(-1, hot.argmax(-1, keepdim=True), 1) * hot


def last_token(s, hot, logits, targets, indices):
    return first_token(s, hot.flip(-1), logits, targets, indices).flip(-1)


def normalised(s, hot, logits, targets, indices):
    return hot / hot.sum(-1, keepdim=True).clamp(min=1)


def label_token(s, hot, logits, targets, indices):
    """The label itself is taken for the token."""
    hot = torch.zeros_like(hot)
    for b, (q, t) in enumerate(indices):
        hot[b, q, targets[b]["labels"][t].clamp(max=hot.shape[-1] - 1)] = 1
    return hot


def wider_span(s, hot, logits, targets, indices):
    return torch.maximum(hot, hot.roll(1, -1) * (torch.arange(hot.shape[-1]) > 0))


def shorter_span(s, hot, logits, targets, indices):
    """The span's end is exclusive once too often; one-token classes keep theirs."""
    following = hot.roll(-1, -1) * (torch.arange(hot.shape[-1]) < hot.shape[-1] - 1)
    return torch.where(hot.sum(-1, keepdim=True) > 1, hot * following, hot)


def filled_span(s, hot, logits, targets, indices):
    """Everything between the first and the last token."""
    return (hot.cumsum(-1) > 0) * (hot.flip(-1).cumsum(-1).flip(-1) > 0).to(hot.dtype)


def unmatched_stop(s, hot, logits, targets, indices):
    hot = hot.clone()
    hot[..., 0] = torch.where(hot.any(-1), hot[..., 0], 1.0)
    return hot


def map_of(images):
    """A label → tokens map from the targets of some images, used for all."""

    def change(s, hot, logits, targets, indices):
        rows = {}
        for t in images(targets):
            for label, row in zip(t["labels"].tolist(), t["token_labels"], strict=True):
                rows[label] = row
        out = hot.clone()
        for b, (q, t) in enumerate(indices):
            for query, label in zip(q.tolist(), targets[b]["labels"][t].tolist(), strict=True):
                if label in rows:
                    out[b, query] = rows[label].to(out.dtype)
        return out

    return hot_then(change)


def valid_as(change):
    return lambda s, layer: change(Grounding.valid(s, layer), layer)


def no_mask_zero(s, layer):
    return torch.ones_like(layer["pred_logits"], dtype=torch.bool)


def finite_zero(s, layer):
    """The caller's −inf become 0 and train."""
    return dict(layer, pred_logits=torch.where(torch.isfinite(layer["pred_logits"]), layer["pred_logits"], 0))


def plain_cells(s, layer, targets, indices, nb, fill, weight):
    logits, valid = layer["pred_logits"], s.valid(layer)
    hot = s.one_hot(logits, targets, indices)
    if fill is not None:
        logits = torch.where(valid, logits, fill)
    found = s.focal(logits, hot)
    return {"loss_ce": (found * weight(valid)).sum() / nb}


def filled(fill):
    return lambda s, layer, targets, i, nb: plain_cells(s, layer, targets, i, nb, fill, torch.ones_like)


def multiplied(s, layer, targets, i, nb):
    return plain_cells(s, layer, targets, i, nb, None, lambda v: v.to(torch.float32))


def to_class_logits(s, layer, targets, indices, nb):
    """Token logits pooled to classes by the maximum, then a focal loss over the image's classes."""
    total = layer["pred_logits"][..., :0].sum()
    for b, (q, t) in enumerate(indices):
        rows = targets[b]["token_labels"].unique(dim=0) if len(targets[b]["labels"]) else targets[b]["token_labels"]
        if not len(rows):
            continue
        pooled = torch.stack([layer["pred_logits"][b][:, row > 0].amax(1) for row in rows], 1)
        hot = torch.zeros_like(pooled)
        for query, j in zip(q.tolist(), t.tolist(), strict=True):
            hot[query, (rows == targets[b]["token_labels"][j]).all(1)] = 1
        total = total + s.focal(pooled, hot).sum()
    return {"loss_ce": total / nb}


def token_divided(count):
    return lambda s, cells, indices, layer: (cells.sum(-1) / count(s.valid(layer)).clamp(min=1)).sum()


def contrastive(s, x, hot):
    """Softmax over the tokens, as in GLIP's other variant."""
    return -(hot * x.log_softmax(-1))


def cut_to_first(valid, layer):
    mask = layer.get("text_mask")
    if mask is None or not len(mask):
        return valid
    length = int(mask[0].nonzero().max()) + 1 if mask[0].any() else 0
    return valid & (torch.arange(valid.shape[-1]) < length)


add(
    "token-normalised",
    "G",
    "TOKEN-1",
    "A class's tokens share a target of 1.",
    one_hot=hot_then(normalised),
    miss=soft_miss,
)
add("token-first", "G", "TOKEN-1", "The first token of the class is the target.", one_hot=hot_then(first_token))
add("token-last", "G", "TOKEN-1", "The last token of the class is the target.", one_hot=hot_then(last_token))
add("token-is-label", "G", "TOKEN-1", "The label is used as the token.", one_hot=hot_then(label_token))
add("token-span-wider", "G", "TOKEN-1", "The span reaches one token too far.", one_hot=hot_then(wider_span))
add("token-span-shorter", "G", "TOKEN-1", "The span ends one token early.", one_hot=hot_then(shorter_span))
add(
    "token-span-filled",
    "G",
    "TOKEN-1",
    "The gap between two tokens of a class is filled.",
    one_hot=hot_then(filled_span),
)
add("token-shifted", "G", "TOKEN-1", "Tokens are off by one, [CLS] forgotten.", one_hot=shifted(1))
add("token-unmatched-first", "G", "TOKEN-1", "Unmatched queries aim at token 0.", one_hot=hot_then(unmatched_stop))
add("token-last-position-lost", "G", "TOKEN-1", "The last token position has no positive.", one_hot=zero_channel(-1))
add("token-first-position-lost", "G", "TOKEN-1", "The first token position has no positive.", one_hot=zero_channel(0))
add(
    "token-map-of-first-image",
    "G",
    "TOKEN-4",
    "Labels are looked up in the prompt of image 0.",
    one_hot=map_of(lambda t: t[:1]),
)
add(
    "token-map-last-wins", "G", "TOKEN-4", "One label map for the batch, later images win.", one_hot=map_of(lambda t: t)
)
add(
    "token-map-previous-image",
    "G",
    "TOKEN-4",
    "One label map for the batch, earlier images win.",
    one_hot=map_of(lambda t: t[::-1]),
)
add(
    "token-smoothed-negatives",
    "G",
    "TOKEN-1",
    "Negatives aim at 0.01.",
    one_hot=hot_then(lambda s, hot, *_: hot.clamp(min=0.01)),
    miss=soft_miss,
)
add(
    "mask-ignored",
    "G",
    "TOKEN-2 TOKEN-3 NUM-2",
    "text_mask is not read: masked tokens train, −inf gives NaN.",
    valid=no_mask_zero,
)
add(
    "mask-ignored-inf-as-zero",
    "G",
    "TOKEN-2 TOKEN-3",
    "Masked −inf logits become 0 and train.",
    loss_labels=filled(0.0),
)
add(
    "mask-fill-minus-two",
    "G",
    "TOKEN-2 TOKEN-3",
    "Masked logits are filled with −2, which adds a constant.",
    loss_labels=filled(-2.0),
)
add("mask-multiplied", "G", "TOKEN-2", "The mask multiplies the loss, so −inf gives NaN.", loss_labels=multiplied)
add(
    "mask-inverted",
    "G",
    "TOKEN-2",
    "text_mask is read as padding mask.",
    valid=valid_as(lambda v, layer: v if layer.get("text_mask") is None else ~v & torch.isfinite(layer["pred_logits"])),
)
add(
    "mask-of-first-image",
    "G",
    "TOKEN-4 TOKEN-2",
    "The mask of image 0 serves all images.",
    valid=valid_as(lambda v, layer: v[:1].expand_as(v) & torch.isfinite(layer["pred_logits"]) if len(v) else v),
)
add(
    "mask-cut-to-first-length",
    "G",
    "TOKEN-4",
    "All prompts are cut to the length of image 0's.",
    valid=valid_as(cut_to_first),
)
add(
    "mask-any-image",
    "G",
    "TOKEN-2",
    "A token that any image uses is used for all, where finite.",
    valid=valid_as(
        lambda v, layer: v.any(0, keepdim=True).expand_as(v) & torch.isfinite(layer["pred_logits"]) if len(v) else v
    ),
)
add(
    "mask-all-images",
    "G",
    "TOKEN-4",
    "Only tokens that all images use count.",
    valid=valid_as(lambda v, layer: v.all(0, keepdim=True).expand_as(v) if len(v) else v),
)
add(
    "mask-last-token-lost",
    "G",
    "TOKEN-2",
    "The last valid token is masked too.",
    valid=valid_as(lambda v, layer: v & (v.flip(-1).cumsum(-1).flip(-1) > 1)),
)
add(
    "mask-first-token-lost",
    "G",
    "TOKEN-2",
    "The first valid token ([CLS]) is masked too.",
    valid=valid_as(lambda v, layer: v & (v.cumsum(-1) > 1)),
)
add(
    "mask-positives-only",
    "G",
    "TOKEN-1 CLS-3",
    "Only tokens of some target's class count.",
    loss_labels=lambda s, layer, targets, i, nb: Grounding.loss_labels(
        s,
        dict(layer, text_mask=torch.stack([t["token_labels"].any(0) for t in targets])) if targets else layer,
        targets,
        i,
        nb,
    ),
)
add(
    "token-mean-valid",
    "G",
    "CLS-6 TOKEN-3",
    "The mean over an image's valid tokens.",
    sum_cells=token_divided(lambda v: v.sum(-1)),
)
add(
    "token-mean-length",
    "G",
    "CLS-6 TOKEN-3",
    "The mean over all T tokens.",
    sum_cells=token_divided(lambda v: torch.full(v.shape[:2], v.shape[2])),
)
add(
    "token-max-pooled",
    "G",
    "TOKEN-1 TOKEN-2",
    "Tokens are pooled to classes by their maximum.",
    loss_labels=to_class_logits,
)
add("token-contrastive", "G", "TOKEN-1", "Softmax over tokens, positives only.", focal=contrastive)
