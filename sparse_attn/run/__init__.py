"""One sampler run: what it remembers, what each of its calls does, what it reports."""
