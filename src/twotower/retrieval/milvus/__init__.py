"""Search through Milvus: a cluster or server, or milvus-lite in a file."""
