"""What keeps the documents in step with the code, and the runs whole."""
