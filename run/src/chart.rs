//! Line charts as self-contained SVG, for reports that open in a browser without anything else.

use std::fmt::Write;
use std::ops::RangeInclusive;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;
/// Room around the plot for title, axis labels and ticks, in pixels.
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 48.0;
const LEGEND_LINE: f64 = 18.0;
/// Keeps names in the legend readable where a line passes behind them.
const HALO: &str = "paint-order=\"stroke\" stroke=\"#fff\" stroke-width=\"4\"";
/// About how many ticks an axis gets.
const TICKS: f64 = 6.0;
/// Okabe & Ito 2008: colours that colour-blind readers can tell apart, without the yellow that white swallows.
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];

/// Draws named series of `(x, y)` points as lines with axes, ticks and a legend, to be read on white. Points that
/// are not finite are left out.
#[must_use]
pub fn line_chart_svg(title: &str, x_label: &str, series: &[(&str, &[(f64, f64)])]) -> String {
    let points =
        || series.iter().flat_map(|(_, points)| *points).filter(|(x, y)| x.is_finite() && y.is_finite());
    let x_axis = Axis::new(points().map(|point| point.0), LEFT..=WIDTH - RIGHT);
    let y_axis = Axis::new(points().map(|point| point.1), HEIGHT - BOTTOM..=TOP);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
         height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#333\" role=\"img\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    put_text(&mut svg, (WIDTH / 2.0, TOP / 2.0 + 5.0), "middle", "font-size=\"15\"", title);
    put_text(&mut svg, ((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 10.0), "middle", "", x_label);
    for tick in x_axis.ticks() {
        let x = x_axis.pixel(tick);
        put_line(&mut svg, (x, TOP), (x, HEIGHT - BOTTOM), "#eee");
        put_text(&mut svg, (x, HEIGHT - BOTTOM + 16.0), "middle", "", &x_axis.label(tick));
    }
    for tick in y_axis.ticks() {
        let y = y_axis.pixel(tick);
        put_line(&mut svg, (LEFT, y), (WIDTH - RIGHT, y), "#eee");
        put_text(&mut svg, (LEFT - 6.0, y + 4.0), "end", "", &y_axis.label(tick));
    }
    put_line(&mut svg, (LEFT, TOP), (LEFT, HEIGHT - BOTTOM), "#333");
    put_line(&mut svg, (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM), "#333");

    for (index, (name, points)) in series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let mut path = String::new();
        for (x, y) in points.iter().filter(|(x, y)| x.is_finite() && y.is_finite()) {
            let _ = write!(path, "{:.1},{:.1} ", x_axis.pixel(*x), y_axis.pixel(*y));
        }
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\" stroke-linejoin=\"round\"/>",
            path.trim_end()
        );
        let y = TOP + 8.0 + LEGEND_LINE * index as f64;
        let _ = writeln!(
            svg,
            "<rect x=\"{}\" y=\"{}\" width=\"14\" height=\"3\" fill=\"{colour}\"/>",
            WIDTH - RIGHT - 20.0,
            y - 5.5
        );
        put_text(&mut svg, (WIDTH - RIGHT - 26.0, y), "end", HALO, name);
    }
    svg.push_str("</svg>\n");
    svg
}

fn put_text(svg: &mut String, (x, y): (f64, f64), anchor: &str, attributes: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ =
        writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {attributes}>{text}</text>");
}

fn put_line(svg: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64), colour: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>"
    );
}

/// Maps values to pixels.
struct Axis {
    low: f64,
    high: f64,
    /// Distance between ticks: 1, 2 or 5 times a power of ten.
    tick: f64,
    pixels: RangeInclusive<f64>,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, pixels: RangeInclusive<f64>) -> Self {
        let (mut low, mut high) = values
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        // A single value gets an axis around it that is wide enough to be counted in doubles.
        if high - low <= low.abs().max(high.abs()) * 1e-9 {
            let margin = (low.abs() * 0.5).max(0.5);
            (low, high) = (low - margin, high + margin);
        }
        let raw = (high - low) / TICKS;
        let power = 10_f64.powf(raw.log10().floor());
        let tick = [1.0, 2.0, 5.0].map(|m| m * power).into_iter().find(|t| *t >= raw).unwrap_or(10.0 * power);
        Self { low, high, tick, pixels }
    }

    fn pixel(&self, value: f64) -> f64 {
        let part = (value - self.low) / (self.high - self.low);
        self.pixels.start() + part * (self.pixels.end() - self.pixels.start())
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let (first, last) = ((self.low / self.tick).ceil(), (self.high / self.tick).floor());
        let count = (last - first) as usize + 1;
        (0..count).map(move |index| (first + index as f64) * self.tick)
    }

    fn label(&self, tick: f64) -> String {
        let largest = self.low.abs().max(self.high.abs());
        if !(1e-4..1e6).contains(&largest) {
            return format!("{tick:.1e}");
        }
        let decimals = (-self.tick.log10().floor()).max(0.0) as usize;
        format!("{tick:.decimals$}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_every_series_with_its_name_and_escapes_text() {
        let a = [(0.0, 5.0), (50.0, f64::NAN), (100.0, 1.0)];
        let svg = line_chart_svg("loss < 5 & falling", "step", &[("train", &a), ("valid", &a[..1])]);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("loss &lt; 5 &amp; falling") && svg.contains(">valid</text>"));
        assert!(svg.contains("points=\"64.0,40.0 624.0,312.0\""), "{svg}");
        assert!(!svg.contains("NaN"));
    }

    #[test]
    fn ticks_are_round_numbers() {
        let labels = |values: [f64; 2]| {
            let axis = Axis::new(values.into_iter(), 0.0..=1.0);
            axis.ticks().map(|tick| axis.label(tick)).collect::<Vec<_>>()
        };
        assert_eq!(labels([0.0, 1000.0]), ["0", "200", "400", "600", "800", "1000"]);
        assert_eq!(labels([0.13, 0.42]), ["0.15", "0.20", "0.25", "0.30", "0.35", "0.40"]);
        assert_eq!(labels([0.0, 1e-6])[5], "1.0e-6");
    }

    #[test]
    fn empty_flat_and_huge_data_draw_too() {
        for points in [&[][..], &[(1.0, 2.0)], &[(0.0, 0.0)], &[(0.0, 1e300), (1.0, -1e300)], &[(1e18, 1e18)]]
        {
            let svg = line_chart_svg("t", "x", &[("a", points)]);
            assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(svg.len() < 10_000);
        }
    }
}
