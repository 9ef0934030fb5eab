"""The method: how a pattern is searched, how blocks are chosen, and how a sparse step uses them."""
