"""Speed, memory and agreement of operators and whole models: ``python -m visionattn.benchmark``.

A *case* (an operator at one size, or a model at one image size) has several *candidates* that compute the same thing.
All candidates of a case are timed in one process, one call each in turn, so that a change in the machine's mood
hits every one of them alike; see ``docs/benchmarks/README.md`` for how to read the tables.

``ops.py``, ``layers.py`` and ``models.py`` say what is measured, ``plain/`` against what, ``measure.py`` how,
``report.py`` how it is shown.
"""
