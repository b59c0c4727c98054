"""`report.html`: a run or a comparison as one file that a browser shows without a server."""
