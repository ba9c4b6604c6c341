"""`twotower benchmark`: indexes on the same rows and queries, in alternating rounds."""
