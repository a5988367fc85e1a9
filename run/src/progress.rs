//! What a person sees while a job runs, on standard error: one line that is rewritten in place on a terminal,
//! plain lines elsewhere.

use std::fmt::Write;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a job prints a line where there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);
/// How often a job rewrites its line on a terminal.
const TERMINAL_INTERVAL: Duration = Duration::from_millis(100);
const MEGABYTE: f64 = 1e6;

/// The one line of a terminal that is rewritten, or a log of lines.
#[derive(Debug)]
struct Line {
    bar: ProgressBar,
    last_shown: Instant,
}

impl Line {
    fn new() -> Self {
        let style =
            ProgressStyle::with_template("{wide_msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style);
        Self { bar, last_shown: Instant::now() }
    }

    fn in_place(&self) -> bool {
        !self.bar.is_hidden()
    }

    fn show(&self, text: String) {
        if self.in_place() {
            self.bar.set_message(text);
        } else {
            eprintln!("{text}");
        }
    }

    /// Whether it is time to show the state of a job again.
    fn is_due(&mut self) -> bool {
        let interval = if self.in_place() { TERMINAL_INTERVAL } else { PLAIN_INTERVAL };
        let is_due = self.last_shown.elapsed() >= interval;
        if is_due {
            self.last_shown = Instant::now();
        }
        is_due
    }

    fn note(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let leaves_a_line = self.in_place() && !self.bar.message().is_empty();
        self.bar.abandon();
        if leaves_a_line {
            eprintln!();
        }
    }
}

/// Progress of a training run: step, losses, rate, time left.
#[derive(Debug)]
pub struct Progress {
    line: Line,
    total_steps: u64,
    start_step: u64,
    start: Instant,
    last_report: Instant,
}

impl Progress {
    /// Starts the clock of a run of `total_steps` that begins (or resumes) with `start_step` steps done.
    #[must_use]
    pub fn new(total_steps: u64, start_step: u64) -> Self {
        let now = Instant::now();
        Self { line: Line::new(), total_steps, start_step, start: now, last_report: now }
    }

    /// Shows the state after `step` steps. `count` is how many of `unit` (`tokens`, `images`) were processed since
    /// the last report; their number per second, shown as the rate, is returned for the metrics.
    pub fn report(&mut self, step: u64, losses: &[(&str, f64)], count: u64, unit: &str) -> f64 {
        let now = Instant::now();
        let rate = per_second(count, now - self.last_report);
        self.last_report = now;
        let mut text = format!("step {step}/{}", self.total_steps);
        for (name, loss) in losses {
            let _ = write!(text, "  {name} {loss:.4}");
        }
        let done = step.saturating_sub(self.start_step);
        let left = time_left(now - self.start, done, self.total_steps.saturating_sub(step));
        let _ = write!(text, "  {} {unit}/s{left}", with_prefix(rate));
        self.line.show(text);
        rate
    }

    /// Prints a line that stays, such as the name of a checkpoint that was saved.
    pub fn note(&self, text: &str) {
        self.line.note(text);
    }
}

/// Progress of another long job: so many of so many, rate, time left.
#[derive(Debug)]
pub struct Task {
    line: Line,
    name: String,
    total: u64,
    unit: &'static str,
    done: u64,
    start: Instant,
}

impl Task {
    /// Starts the clock of a job called `name` (such as `encode pictures`) over `total` of `unit` (`images`).
    #[must_use]
    pub fn new(name: &str, total: u64, unit: &'static str) -> Self {
        Self { line: Line::new(), name: name.to_owned(), total, unit, done: 0, start: Instant::now() }
    }

    /// Counts `n` more as done and shows the state if it is time to.
    pub fn advance(&mut self, n: u64) {
        self.done += n;
        if self.line.is_due() {
            self.line.show(self.text(self.start.elapsed()));
        }
    }

    /// Shows the final state and returns how long the job took.
    pub fn finish(self) -> Duration {
        let elapsed = self.start.elapsed();
        self.line.show(format!("{}, {}", self.text(elapsed), duration(elapsed)));
        elapsed
    }

    fn text(&self, elapsed: Duration) -> String {
        let Self { name, total, unit, done, .. } = self;
        let rate = with_prefix(per_second(*done, elapsed));
        let left = time_left(elapsed, *done, total.saturating_sub(*done));
        format!("{name}: {done}/{total} {unit}  {rate} {unit}/s{left}")
    }
}

/// Progress of shards that are fetched: a function to be called with how many came, how many have to come, and the bytes
/// that came. Nothing is shown before the first call; the last is the one in which all came.
pub fn fetching() -> impl FnMut(usize, usize, u64) + Send {
    let mut job = None;
    move |done, all, bytes| {
        let (line, start) = job.get_or_insert_with(|| (Line::new(), Instant::now()));
        let elapsed = start.elapsed();
        let text = || fetching_text(done, all, bytes, elapsed);
        if done == all {
            line.show(format!("{}, {}", text(), duration(elapsed)));
        } else if line.is_due() {
            line.show(text());
        }
    }
}

fn fetching_text(done: usize, all: usize, bytes: u64, elapsed: Duration) -> String {
    let (megabytes, rate) = (bytes as f64 / MEGABYTE, per_second(bytes, elapsed) / MEGABYTE);
    let left = time_left(elapsed, done as u64, all.saturating_sub(done) as u64);
    format!("fetch: {done}/{all} shards  {megabytes:.1} MB  {rate:.1} MB/s{left}")
}

fn per_second(count: u64, elapsed: Duration) -> f64 {
    if elapsed.is_zero() { 0.0 } else { count as f64 / elapsed.as_secs_f64() }
}

/// The time that `left` more will take if they go like the first `done`; nothing where that says nothing.
fn time_left(elapsed: Duration, done: u64, left: u64) -> String {
    if done == 0 || left == 0 {
        return String::new();
    }
    let seconds = elapsed.as_secs_f64() * left as f64 / done as f64;
    Duration::try_from_secs_f64(seconds)
        .map_or_else(|_| String::new(), |left| format!("  {} left", duration(left)))
}

/// Three or more significant digits, with k or M.
fn with_prefix(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.2}M", v / 1e6),
        v if v >= 1e4 => format!("{:.1}k", v / 1e3),
        v if v >= 100.0 => format!("{v:.0}"),
        v => format!("{v:.2}"),
    }
}

/// A duration in the two units that matter.
fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min {} s", seconds % 60),
        3600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let text = |seconds| duration(Duration::from_secs_f64(seconds));
        assert_eq!(text(1.26), "1.3 s");
        assert_eq!(text(59.9), "59 s");
        assert_eq!(text(61.0), "1 min 1 s");
        assert_eq!(text(7_300.0), "2 h 1 min");
        assert_eq!(text(90_000.0), "1 d 1 h");
    }

    #[test]
    fn rates_read_well() {
        let texts = [0.5, 12.0, 731.4, 86_800.0, 1_234_567.0].map(with_prefix);
        assert_eq!(texts, ["0.50", "12.00", "731", "86.8k", "1.23M"]);
    }

    #[test]
    fn time_left_follows_from_the_pace_so_far() {
        assert_eq!(time_left(Duration::from_secs(10), 5, 60), "  2 min 0 s left");
        assert_eq!(time_left(Duration::from_secs(10), 0, 60), "");
        assert_eq!(time_left(Duration::from_secs(10), 60, 0), "");
        assert_eq!(time_left(Duration::MAX, 1, u64::MAX), "");
    }

    #[test]
    fn a_report_returns_the_rate_since_the_last_one() {
        let mut progress = Progress::new(100, 50);
        std::thread::sleep(Duration::from_millis(20));
        let rate = progress.report(60, &[("loss", 1.5)], 100, "tokens");
        assert!(rate > 0.0 && rate <= 5_000.0, "{rate}");
    }

    #[test]
    fn a_task_says_how_far_it_is() {
        let mut task = Task::new("encode", 100, "images");
        task.advance(20);
        assert_eq!(task.text(Duration::from_secs(2)), "encode: 20/100 images  10.00 images/s  8.0 s left");
    }

    #[test]
    fn fetching_says_how_far_it_is() {
        let text = fetching_text(5, 20, 1_240_000_000, Duration::from_secs(10));
        assert_eq!(text, "fetch: 5/20 shards  1240.0 MB  124.0 MB/s  30 s left");
    }
}
