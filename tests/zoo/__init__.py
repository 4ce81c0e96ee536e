"""Criterions written from the contract alone, without the project's textbook, for the suite to judge."""

from .port import Right, Wrong
from .right import RIGHT
from .wrong import WRONG

__all__ = ["RIGHT", "WRONG", "Right", "Wrong"]
