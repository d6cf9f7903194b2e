"""What a checkpoint holds, how it is written and read, and from which one a run resumes."""
