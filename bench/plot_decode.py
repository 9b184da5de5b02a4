#!/usr/bin/env python3
"""Draws tokens per second against batch size from results of decode_bench, as SVG.

plot_decode.py RESULT.json [RESULT.json...] --tokens 131072 --out FILE.svg
"""

import argparse
import html
import json
import math

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 380, 70, 170, 40, 50
COLOURS = {"full": "#444444", "state": "#0072b2", "rows": "#d55e00", "auto": "#009e73"}
NAMES = {
    "full": "full attention, HBM",
    "state": "kvseek, state",
    "rows": "kvseek, rows",
    "auto": "kvseek, chosen",
}


def curves(cases, tokens):
    """Attention -> [(batch, tokens/s)], and the largest batch that full attention has room for."""
    points = {}
    room = None
    for case in cases:
        if case["tokens"] != tokens:
            continue
        room = case["full_batch_max"]
        if case.get("fits") and "tokens_per_s" in case:
            points.setdefault(case["attention"], []).append((case["batch"], case["tokens_per_s"]))
    return {name: sorted(line) for name, line in points.items()}, room


def scale(low, high, begin, end):
    """A logarithmic axis."""
    span = math.log(high / low) or 1.0
    return lambda value: begin + (end - begin) * math.log(value / low) / span


def ticks(low, high):
    exponent = math.floor(math.log10(low))
    while 10**exponent <= high:
        for step in (1, 2, 5):
            if low <= step * 10**exponent <= high:
                yield step * 10**exponent
        exponent += 1


def draw(title, lines, room):
    batches = [batch for line in lines.values() for batch, _ in line]
    rates = [rate for line in lines.values() for _, rate in line]
    low_x, high_x = min(batches) * 0.9, max(max(batches), room or 1) * 1.15
    low_y, high_y = min(rates) * 0.8, max(rates) * 1.3
    x = scale(low_x, high_x, LEFT, WIDTH - RIGHT)
    y = scale(low_y, high_y, HEIGHT - BOTTOM, TOP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{html.escape(title)}</text>',
    ]
    for value in ticks(low_x, high_x):
        out.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>'
            f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
        )
    for value in ticks(low_y, high_y):
        out.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    if room:
        out.append(
            f'<line x1="{x(room):.1f}" x2="{x(room):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
            'stroke="#444" stroke-dasharray="5 4"/>'
            f'<text x="{x(room) + 4:.1f}" y="{TOP + 12}">HBM is full</text>'
        )
    for i, (name, line) in enumerate(sorted(lines.items())):
        path = " ".join(f"{x(b):.1f},{y(r):.1f}" for b, r in line)
        colour = COLOURS[name]
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x(b):.1f}" cy="{y(r):.1f}" r="3" fill="{colour}"/>' for b, r in line]
        out.append(
            f'<text x="{WIDTH - RIGHT + 10}" y="{TOP + 20 + 18 * i}" fill="{colour}">{NAMES[name]}</text>'
        )
    out.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">sequences in a batch</text>'
        f'<text x="16" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(TOP + HEIGHT - BOTTOM) / 2})">tokens a second</text></svg>'
    )
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    cases = []
    for name in options.results:
        with open(name, encoding="utf-8") as file:
            cases += json.load(file)["cases"]
    lines, room = curves(cases, options.tokens)
    if not lines:
        parser.error("no case of so many tokens was measured")
    title = f"{cases[0]['model']}, {options.tokens // 1024}K tokens a sequence"
    with open(options.out, "w", encoding="utf-8") as file:
        file.write(draw(title, lines, room))


if __name__ == "__main__":
    main()
