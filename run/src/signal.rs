//! A polite stop on Ctrl-C and SIGTERM.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Result, RunError};

/// Exit code of a process that a second signal ended at once: 128 + SIGINT, as shells report it.
const EXIT_INTERRUPTED: i32 = 130;

static REQUESTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Says whether the user or the system asked this process to stop.
///
/// After [`StopFlag::install`] the first SIGINT or SIGTERM only raises the flag, so that a training loop can finish
/// its step and save; a second one ends the process at once with code 130. SIGHUP is left as it is, so that `nohup`
/// works.
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
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag down, raises it and goes on; the second finds it raised.
            flag::register_conditional_shutdown(signal, EXIT_INTERRUPTED, requested.clone())
                .and_then(|_| flag::register(signal, requested.clone()))
                .map_err(RunError::Signal)?;
        }
        Ok(Self(REQUESTED.get_or_init(|| requested).clone()))
    }

    /// Whether a stop was asked for.
    #[must_use]
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::testing::{child, is_child};

    const NAME: &str = "signal::tests::first_signal_asks_and_second_ends";
    const PATIENCE: Duration = Duration::from_secs(20);

    fn wait_for_flag(flag: &StopFlag) {
        let start = Instant::now();
        while !flag.requested() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(flag.requested());
    }

    #[test]
    fn first_signal_asks_and_second_ends() {
        if is_child() {
            let flag = StopFlag::install().unwrap();
            let same = StopFlag::install().unwrap();
            assert!(!flag.requested());
            eprintln!("ready");
            wait_for_flag(&flag);
            assert!(same.requested());
            eprintln!("requested");
            std::thread::sleep(PATIENCE);
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
        signal("TERM");
        assert_eq!(process.wait().unwrap().code(), Some(EXIT_INTERRUPTED));
    }
}
