"""What `stage=` can be: one file each."""
