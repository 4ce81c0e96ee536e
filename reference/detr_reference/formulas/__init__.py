"""The textbook's formulas, one short function each, in float64, per image and per layer."""
