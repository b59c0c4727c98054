"""The configuration of a run: its settings, how they are composed and checked, and the run's identity."""
