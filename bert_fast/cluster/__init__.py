"""The home of what a run would take on a machine we do not have: network model, timeline, prediction."""
