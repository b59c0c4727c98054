"""Sweeps. Each member is a run in a process of its own. The tracker shows the members under one parent run.

Layout of a sweep:

    <out>/sweeps/<id>/
      lock                          held while the sweep runs
      sweep.json                    the members and their states
      journal.jsonl                 what the tracker shows
      1.log 2.log ...               everything that each member printed
      ranking.md ranking.csv heat_map.png samples.png

A member is `python -m trainer <overrides>`, which continues an unfinished run and does nothing if the run is finished.
Therefore the command that started a sweep also continues it, and a member that fails does not affect the others.
"""
