"""What a run needs of memory, and (in later work) how to need less."""
