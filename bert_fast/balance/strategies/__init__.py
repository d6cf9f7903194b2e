"""The strategies of `balance.strategy`, one file per family; `config.choices.STRATEGIES` lists them."""
