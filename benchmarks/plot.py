"""A picture of what an event costs, by the number of events that arrive in a piece."""

from __future__ import annotations

import math

Curve = dict[float, float]

_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#ff7f0e")
_LEFT, _WIDTH, _TOP, _BOTTOM = 45, 290, 35, 250
_LOWEST_US = 0.1  # a cost below is drawn here


def picture(curves: dict[str, dict[str, Curve]]) -> str:
    """Draw a panel for each way of reading. Both axes are logarithmic.

    `curves` has microseconds by events per piece, by the name of an instrumentation, by the way of reading.
    """
    names = list(dict.fromkeys(name for panel in curves.values() for name in panel))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    every = [cost for panel in curves.values() for curve in panel.values() for cost in curve.values()]
    highest = 10 ** math.ceil(math.log10(max(max(every), 1.0)))
    panels = [
        _panel(number * 360, how, panel, colours, highest)
        for number, (how, panel) in enumerate(curves.items())
    ]
    legend = [
        f'<text x="{60 + 330 * (number % 2)}" y="{306 + 16 * (number // 2)}" fill="{colour}">{name}</text>'
        for number, (name, colour) in enumerate(colours.items())
    ]
    height = 300 + 16 * math.ceil(len(names) / 2)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" '
        'font-family="sans-serif" font-size="11">'
        f'<rect width="720" height="{height}" fill="white"/>'
        f"{''.join(panels)}{''.join(legend)}</svg>\n"
    )


def _panel(left: int, how: str, panel: dict[str, Curve], colours: dict[str, str], highest_us: float) -> str:
    numbers = sorted({number for curve in panel.values() for number in curve})
    widest = math.log10(max(numbers[-1], 10))
    decades = math.log10(highest_us / _LOWEST_US)

    def at(number: float, cost_us: float) -> tuple[float, float]:
        height = math.log10(max(cost_us, _LOWEST_US) / _LOWEST_US) / decades
        return left + _LEFT + _WIDTH * math.log10(number) / widest, _BOTTOM - (_BOTTOM - _TOP) * height

    axes = f"M{left + _LEFT} {_TOP}V{_BOTTOM}H{left + _LEFT + _WIDTH}"
    parts = [
        f'<path d="{axes}" fill="none" stroke="black"/>',
        f'<text x="{left + 60}" y="18">added per event in the real SDK, us, {how}</text>',
        f'<text x="{left + 190}" y="286" text-anchor="middle">events per piece</text>',
    ]
    for number in numbers:
        x, _ = at(number, highest_us)
        parts.append(f'<text x="{x:.0f}" y="266" text-anchor="middle">{number:.0f}</text>')
    for decade in range(round(decades) + 1):
        cost_us = _LOWEST_US * 10**decade
        _, y = at(1, cost_us)
        parts.append(f'<text x="{left + 40}" y="{y + 4:.0f}" text-anchor="end">{cost_us:g}</text>')
        parts.append(
            f'<path d="M{left + _LEFT} {y:.1f}h{_WIDTH}" stroke="#ddd" stroke-width="{1 if decade else 0}"/>'
        )
    for name, curve in panel.items():
        points = [at(number, cost_us) for number, cost_us in sorted(curve.items())]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[name]}"/>' for x, y in points]
    return "".join(parts)
