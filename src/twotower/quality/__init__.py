"""What is wrong with a data set: faults, duplicates, leaks, captions, and a cleaned manifest."""
