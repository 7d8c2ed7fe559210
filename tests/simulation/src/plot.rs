//! Line plots as SVG: small, without scripts, readable on light and dark pages.

use std::fmt::Write as _;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 96.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 44.0;
/// Told apart by people who see colours differently, too.
const COLOURS: [&str; 5] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f"];

/// One line: its name and its points.
#[derive(Clone, Debug)]
pub struct Line {
    /// What stands at its end.
    pub name: String,
    /// In order of x.
    pub points: Vec<(f64, f64)>,
}

/// A plot.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Above it.
    pub title: String,
    /// Below it.
    pub x_axis: String,
    /// The lowest and highest y, with what is written beside them.
    pub y_axis: String,
    /// From and to.
    pub x: (f64, f64),
    /// From and to.
    pub y: (f64, f64),
    /// The lines.
    pub lines: Vec<Line>,
}

impl Plot {
    /// The file's text.
    pub fn svg(&self) -> String {
        let mut svg = format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
<text x="{LEFT}" y="18" font-size="14">{}</text>
"##,
            self.title
        );
        self.axes(&mut svg);
        let mut labels = Vec::new();
        for (line, colour) in self.lines.iter().zip(COLOURS.iter().cycle()) {
            let points: Vec<_> = line.points.iter().map(|&point| self.at(point)).collect();
            let path: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = writeln!(
                svg,
                r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
                path.join(" ")
            );
            if let Some(&(_, y)) = points.last() {
                labels.push((y, line.name.as_str(), *colour));
            }
        }
        spread(&mut labels);
        for (y, name, colour) in labels {
            let x = WIDTH - RIGHT + 8.0;
            let _ = writeln!(svg, r#"<text x="{x}" y="{:.1}" fill="{colour}">{name}</text>"#, y + 4.0);
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn axes(&self, svg: &mut String) {
        let (x0, y0) = self.at((self.x.0, self.y.0));
        let (x1, y1) = self.at((self.x.1, self.y.1));
        let _ = writeln!(svg, r##"<path d="M{x0},{y1} V{y0} H{x1}" fill="none" stroke="#444"/>"##);
        for step in 0..=4 {
            let share = f64::from(step) / 4.0;
            let (x, y) = (self.x.0 + (self.x.1 - self.x.0) * share, self.y.0 + (self.y.1 - self.y.0) * share);
            let (at_x, at_y) = self.at((x, y));
            let _ = writeln!(svg, r##"<path d="M{x0},{at_y:.1} H{x1}" stroke="#ddd"/>"##);
            let _ = writeln!(
                svg,
                r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                x0 - 6.0,
                at_y + 4.0,
                number(y)
            );
            let _ =
                writeln!(svg, r#"<text x="{at_x:.1}" y="{:.1}" text-anchor="middle">{}</text>"#, y0 + 16.0, number(x));
        }
        let middle = x0.midpoint(x1);
        let _ = writeln!(
            svg,
            r#"<text x="{middle:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
            HEIGHT - 8.0,
            self.x_axis
        );
        let _ = writeln!(svg, r#"<text x="6" y="{:.1}">{}</text>"#, TOP - 4.0, self.y_axis);
    }

    fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let part = |value: f64, (from, to): (f64, f64)| ((value - from) / (to - from)).clamp(0.0, 1.0);
        let right = LEFT + (WIDTH - LEFT - RIGHT) * part(x, self.x);
        let down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * part(y, self.y);
        (right, down)
    }
}

fn number(value: f64) -> String {
    if value.abs() >= 10.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

/// Moves labels apart that would cover each other.
fn spread(labels: &mut [(f64, &str, &str)]) {
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    for at in 1..labels.len() {
        labels[at].0 = labels[at].0.max(labels[at - 1].0 + 14.0);
    }
}
