"""The kinds of sources of pairs, one file per kind; `config.choices.PAIR_SOURCES` lists them."""
