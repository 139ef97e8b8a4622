"""One question a file, with its figures and tables beside it."""
