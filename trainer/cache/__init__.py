"""Content-addressed cache of encoder outputs."""
