"""The kinds of corpora, one file per kind; `config.choices.CORPORA` lists them."""
