"""Asking: queries, filters and judgements as they are typed, and the collections they search."""
