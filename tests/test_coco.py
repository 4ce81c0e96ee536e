"""COCO annotations become targets as in DETR, and every known wrong conversion shows on the golden cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from detr_conformance import golden_coco
from detr_conformance.golden_coco import MISTAKES, Mistake, differences, second
from detr_fixtures import golden
from detr_reference.coco import coco

torch.set_num_threads(1)
CASES, FILE = golden_coco.of_folder(golden.GOLDEN)


def one_image(*annotations: dict[str, Any]) -> dict[str, Any]:
    """An annotation file of one image, 20 pixels wide and 10 high, of the categories 3 and 7."""
    own = [{"image_id": 1, "iscrowd": 0, "category_id": 7, **one} for one in annotations]
    categories = [{"id": 7}, {"id": 3}]
    return {"images": [{"id": 1, "width": 20, "height": 10}], "categories": categories, "annotations": own}


def test_the_corner_and_size_in_pixels_become_centre_and_size_in_units_of_the_image() -> None:
    target = coco(one_image({"bbox": [4, 2, 8, 5]}), 1)
    assert target["boxes"].tolist() == [pytest.approx([8 / 20, 4.5 / 10, 8 / 20, 5 / 10])]


def test_a_label_is_the_id_or_its_place_among_all() -> None:
    file = one_image({"bbox": [4, 2, 8, 5]})
    assert coco(file, 1)["labels"].tolist() == [7]
    assert coco(file, 1, contiguous=True)["labels"].tolist() == [1]


def test_boxes_are_cut_to_the_image_and_dropped_where_nothing_is_left() -> None:
    target = coco(one_image({"bbox": [-4, 6, 8, 9]}, {"bbox": [20, 0, 5, 5]}, {"bbox": [3, 3, 0, 4]}), 1)
    assert target["boxes"].tolist() == [pytest.approx([2 / 20, 8 / 10, 4 / 20, 4 / 10])]


def test_an_image_of_crowds_alone_has_no_target() -> None:
    target = coco(one_image({"bbox": [0, 0, 5, 5], "iscrowd": 1}), 1, masks=True)
    assert {key: tuple(value.shape) for key, value in target.items()} == {
        "labels": (0,),
        "boxes": (0, 4),
        "masks": (0, 10, 20),
    }


def test_polygons_and_run_lengths_plain_or_compressed_are_the_same_mask() -> None:
    pixels = np.zeros((10, 20), np.uint8)
    pixels[2:7, 4:12] = 1
    plain = np.diff(np.flatnonzero(np.diff(pixels.T.ravel(), prepend=2, append=2))).tolist()
    packed = rle.encode(np.asfortranarray(pixels))
    forms = [
        [[4, 2, 12, 2, 12, 7, 4, 7]],
        {"size": [10, 20], "counts": plain},
        {"size": [10, 20], "counts": packed["counts"].decode("ascii")},
    ]
    for form in forms:
        masks = coco(one_image({"bbox": [4, 2, 8, 5], "segmentation": form}), 1, masks=True)["masks"]
        assert torch.equal(masks[0], torch.from_numpy(pixels).bool())


def test_an_unknown_image_is_named() -> None:
    with pytest.raises(KeyError, match="no image 2"):
        coco(one_image(), 2)


def test_golden_targets_are_those_of_both_ways() -> None:
    assert differences(coco, CASES, FILE) == []
    assert differences(second, CASES, FILE) == []
    assert list(golden_coco.problems(CASES, FILE)) == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.id)
def test_every_wrong_conversion_shows(mistake: Mistake) -> None:
    assert differences(mistake.wrong, CASES, FILE)


def test_a_wrong_conversion_that_nothing_shows_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_coco, "MISTAKES", (replace(MISTAKES[0], wrong=coco),))
    (line,) = golden_coco.problems(CASES, FILE)
    assert line == "coco-xywh-as-cxcywh makes the golden targets too: no case shows it"
