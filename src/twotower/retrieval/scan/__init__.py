"""What `index=exact` scans: certified bounds by int8 codes in C or with torch, or fp32 scores."""
