"""`e3rl rehearse`: a recipe's own commands and processes, with a model, lengths and data small enough for any machine."""
