"""Studies: a grid of models, seeds and data sets, run to the end, measured alike, and reported."""
