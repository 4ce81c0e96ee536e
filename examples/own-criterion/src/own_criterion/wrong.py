"""The same criterion with a mistake that is easily made: l1_loss takes the mean of everything by default."""

import torch.nn.functional as F

from own_criterion import Criterion
from own_criterion import build_criterion as right


class Wrong(Criterion):
    def l1(self, predicted, wanted, boxes):
        return F.l1_loss(predicted, wanted) if len(predicted) else predicted.sum()


def build_criterion(num_classes=91, num_decoder_layers=6, eos_coef=0.1):
    inner = right(num_classes, num_decoder_layers, eos_coef)
    return Wrong(inner.num_classes, inner.eos_coef, inner.matcher, inner.weight_dict)
