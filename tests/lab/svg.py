"""Line plots as SVG text."""

from html import escape
from math import floor, log10

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#0a7ea4", "#6e7781", "#e16f24",
           "#b3005e", "#444c56", "#ff8fab", "#9ee493")  # fmt: skip
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 460, 60, 50, 40
LEGEND = 390


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers between low and high."""
    raw = (high - low) / count
    power = 10.0 ** floor(log10(raw))
    step = power * next(s for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first = -(-low // step)
    return [round((first + i) * step, 6) for i in range(int((high - first * step) / step) + 1)]


def lines(curves: dict[str, list], x_label: str, y_label: str, title: str) -> str:
    """One line with dots per {name: [(x, y), ...]}, named on the right, best first."""
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    x0, x1 = min(xs) * 0.9, max(xs) * 1.05
    y0, y1 = min(ys) - 0.5, max(ys) + 0.5

    def place(x, y):
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + LEGEND} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH + LEGEND}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {HEIGHT / 2})">{escape(y_label)}</text>',
    ]
    for x in ticks(x0, x1):
        px, _ = place(x, y0)
        parts.append(f'<path d="M{px:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{px:.1f}" y="{HEIGHT - 34}" text-anchor="middle">{x:g}</text>')
    for y in ticks(y0, y1):
        _, py = place(x0, y)
        parts.append(f'<path d="M{LEFT} {py:.1f}H{WIDTH}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    ranked = sorted(curves.items(), key=lambda item: -max(y for _, y in item[1]))
    for i, (name, points) in enumerate(ranked):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in sorted(points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in points:
            px, py = place(x, y)
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{colour}"/>')
        row = TOP + 10 + 18 * i
        parts.append(f'<path d="M{WIDTH + 12} {row}h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{WIDTH + 36}" y="{row + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])
