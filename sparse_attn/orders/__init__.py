"""Orders of the tokens: which of them share a block."""
