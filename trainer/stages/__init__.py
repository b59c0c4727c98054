"""The stages: one file for each value of `stage=`."""
