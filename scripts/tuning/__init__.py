"""The search for hyper-parameters behind scripts/tune.py.

`study_file` reads what is searched, `search` keeps the trials, `trial` runs one, `workers` shares them out, `final` runs the
best points again, `report` shows it all.
"""
