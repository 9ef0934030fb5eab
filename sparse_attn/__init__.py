"""AdaSpa: find a video's block pattern exactly, once or twice, and skip the rest."""
