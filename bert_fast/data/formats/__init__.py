"""Foreign data formats, one file a format."""
