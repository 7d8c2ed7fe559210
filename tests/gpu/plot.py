"""One figure as an SVG: ours beside the reference for each model, targets marked. The standard library only."""
from xml.sax.saxutils import escape

from records import judged, short, target_text, title, verdict

WIDTH, LEFT, RIGHT = 860, 190, 120
BAR, GAP, TOP, BOTTOM = 13, 12, 64, 34
OURS, REFERENCE, MISSED, INK, GRID = "#1f6feb", "#b6bcc6", "#c93c37", "#24292f", "#e4e7eb"
# Most lines that help reading the scale.
TICKS_MAX = 6


def scale(most):
    """A round step, and the end of an axis of at most TICKS_MAX of them that holds `most`."""
    if most <= 0:
        return 1.0, 1.0
    step = 10.0 ** -9
    while True:
        for factor in (1, 2, 5):
            if factor * step * TICKS_MAX >= most:
                size = factor * step
                steps = int(most / size + 1 - 1e-9)
                return size, max(1, steps) * size
        step *= 10


def target_value(record):
    """Where our bar should end, or None."""
    if record["target"] is None:
        return None
    bound = next(iter(record["target"].values()))
    return bound if record["ratio"] is None else bound * record["reference"]


def text(x, y, content, anchor="start", size=12, colour=INK, weight="normal"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}" '
            f'font-weight="{weight}">{escape(content)}</text>')


def bar(x, y, width, colour, hint):
    return f'<rect x="{x}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{BAR}" fill="{colour}"><title>{escape(hint)}</title></rect>'


def legend(records):
    names = dict.fromkeys(record["reference_name"] for record in records if record["reference"] is not None)
    marks = [(OURS, "ours"), *((REFERENCE, name or "reference") for name in names)]
    if any(verdict(record) in ("missed", "wrong") for record in records):
        marks.insert(1, (MISSED, "ours, target missed or outputs wrong"))
    parts, x = [], LEFT
    for colour, name in marks:
        parts += [f'<rect x="{x}" y="34" width="10" height="10" fill="{colour}"/>', text(x + 14, 43, name, size=11)]
        x += 24 + 6.3 * len(name)
    if any(record["target"] for record in records):
        parts += [f'<path d="M{x + 3} 33v12" stroke="{INK}" stroke-width="2"/>', text(x + 10, 43, "target", size=11)]
    return parts


def row(record, y, per_unit):
    """A model's bars."""
    bad = verdict(record) in ("missed", "wrong")
    unit, has_reference = record["unit"], record["reference"] is not None
    height = BAR * (2 if has_reference else 1)
    parts = [text(LEFT - 8, y + height / 2 + 4, f"{record['model']} {record['dtype']}", "end")]
    width = record["ours"] * per_unit
    parts.append(bar(LEFT, y, width, MISSED if bad else OURS, f"ours: {short(record['ours'])} {unit}"))
    if has_reference:
        reference = record["reference"]
        parts.append(bar(LEFT, y + BAR, reference * per_unit, REFERENCE, f"{record['reference_name']}: {short(reference)} {unit}"))
    goal = target_value(record)
    if goal is not None:
        parts.append(f'<path d="M{LEFT + goal * per_unit:.1f} {y - 2:.1f}v{height + 4}" stroke="{INK}" stroke-width="2"/>')
    said = f"{short(judged(record))}" + ("" if record["ratio"] is None else "x")
    said += "" if record["target"] is None else f" ({target_text(record['target'])})"
    parts.append(text(WIDTH - RIGHT + 8, y + height / 2 + 4, said, colour=MISSED if bad else INK))
    return parts, height


def svg(figure, records):
    """The plot of one figure's records."""
    most = max([0.0, *(value for r in records for value in (r["ours"], r["reference"], target_value(r)) if value is not None)])
    step, end = scale(most)
    per_unit = (WIDTH - LEFT - RIGHT) / end
    bars, y = [], TOP
    for record in records:
        parts, height = row(record, y, per_unit)
        bars += parts
        y += height + GAP
    unit = next((record["unit"] for record in records if record["unit"]), "")
    grid = []
    for tick in range(round(end / step) + 1):
        x = LEFT + tick * step * per_unit
        grid.append(f'<path d="M{x:.1f} {TOP - 8}V{y:.1f}" stroke="{GRID}"/>')
        grid.append(text(x, y + 16, f"{tick * step:g}", "middle", 11))
    heading = [text(LEFT, 20, title(figure) + (f", {unit}" if unit else ""), size=15, weight="bold"), *legend(records)]
    height = y + BOTTOM
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}" '
        'font-family="system-ui, sans-serif">', f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        *heading, *grid, *bars, "</svg>", ""])
