//! A polite stop on Ctrl-C and SIGTERM.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

use crate::error::{Result, RunError};

/// Exit code of a process that a second signal ended at once: 128 + SIGINT, as shells report it.
const EXIT_INTERRUPTED: i32 = 130;

/// Signals this soon after the first are the same wish: `timeout` and job schedulers signal a process and its group.
const SAME_WISH: Duration = Duration::from_secs(1);

static REQUESTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Says whether the user or the system asked this process to stop.
///
/// After [`StopFlag::install`] the first SIGINT or SIGTERM only raises the flag, so that a training loop can finish
/// its step and save; a later one, a second or more after it, ends the process at once with code 130. SIGHUP is left as
/// it is, so that `nohup` works.
#[derive(Debug, Clone)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Installs the signal handlers; later calls share the first one's.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn install() -> Result<Self> {
        if let Some(flag) = REQUESTED.get() {
            return Ok(Self(flag.clone()));
        }
        let requested = Arc::new(AtomicBool::new(false));
        let signals = Signals::new([SIGINT, SIGTERM]).map_err(RunError::Signal)?;
        let flag = requested.clone();
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || watch(signals, &flag))
            .map_err(RunError::Signal)?;
        Ok(Self(REQUESTED.get_or_init(|| requested).clone()))
    }

    /// Whether a stop was asked for.
    #[must_use]
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

fn watch(mut signals: Signals, requested: &AtomicBool) {
    let mut first: Option<Instant> = None;
    for _ in signals.forever() {
        requested.store(true, Ordering::SeqCst);
        if first.get_or_insert_with(Instant::now).elapsed() >= SAME_WISH {
            low_level::exit(EXIT_INTERRUPTED);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use super::*;
    use crate::testing::{child, is_child};

    const NAME: &str = "signal::tests::the_first_signal_asks_and_a_later_one_ends";
    const PATIENCE: Duration = Duration::from_secs(20);

    fn wait_for_flag(flag: &StopFlag) {
        let start = Instant::now();
        while !flag.requested() && start.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(flag.requested());
    }

    #[test]
    fn the_first_signal_asks_and_a_later_one_ends() {
        if is_child() {
            let flag = StopFlag::install().unwrap();
            let same = StopFlag::install().unwrap();
            assert!(!flag.requested());
            eprintln!("ready");
            wait_for_flag(&flag);
            assert!(same.requested());
            eprintln!("requested");
            thread::sleep(PATIENCE);
            return;
        }
        interrupt_then_terminate(":");
    }

    /// `nohup` and a script's background start a process with signals ignored.
    #[test]
    fn signals_that_were_ignored_at_the_start_work_too() {
        interrupt_then_terminate("trap '' INT HUP");
    }

    fn interrupt_then_terminate(setup: &str) {
        let mut process = child(NAME, std::path::Path::new("."), setup)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let id = process.id();
        let signal = |name: &str| {
            let status = Command::new("sh").args(["-c", &format!("kill -{name} {id}")]).status().unwrap();
            assert!(status.success());
        };
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map(|line| line.unwrap());
        assert!(lines.any(|line| line == "ready"));
        signal("INT");
        assert!(lines.any(|line| line == "requested"));
        signal("INT");
        thread::sleep(SAME_WISH);
        assert_eq!(process.try_wait().unwrap(), None, "two signals at once are one wish");
        signal("TERM");
        assert_eq!(process.wait().unwrap().code(), Some(EXIT_INTERRUPTED));
    }
}
