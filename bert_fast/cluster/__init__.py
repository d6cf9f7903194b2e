"""Prediction of what a run takes on a machine that is not at hand."""
