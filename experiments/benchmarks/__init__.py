"""One comparison of speed or memory a file."""
