"""Plots of the lab's results, by matplotlib."""

from pathlib import Path


def lines(curves: dict[str, list], x_label: str, y_label: str, title: str, path: Path) -> None:
    """One line with dots per {name: [(x, y), ...]}, named on the right, best first; an SVG file."""
    import matplotlib
    from matplotlib.figure import Figure

    # the same file from the same figures
    style = {"svg.hashsalt": "lab", "svg.fonttype": "none", "axes.grid": True, "grid.color": "0.9"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
        colours = matplotlib.colormaps["tab20"].colors
        ranked = sorted(curves.items(), key=lambda item: -max(y for _, y in item[1]))
        for number, (name, points) in enumerate(ranked):
            colour = colours[number % len(colours)]
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, color=colour)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
