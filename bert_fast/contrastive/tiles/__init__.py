"""How one tile of scores is computed: a file for each way."""
