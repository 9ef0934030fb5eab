"""Sigma to progress: which share of the whole schedule lies before a noise level."""


def progress_of(model_sampling, sigma: float) -> float:
    """Invert `model_sampling.percent_to_sigma`, which falls from percent 0 to 1.

    Returns:
        Share in [0, 1].
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        # a hair above, so that a sigma rounded to float32 finds its own percent
        if float(model_sampling.percent_to_sigma(middle)) > float(sigma) * (1 + 1e-6):
            low = middle
        else:
            high = middle
    return high if high < 1e-6 else low if low > 1 - 1e-6 else (low + high) / 2
