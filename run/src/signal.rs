//! A polite stop on Ctrl-C and SIGTERM.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::Result;

/// Exit code of a process that a second signal ended at once: 128 + SIGINT, as shells report it.
const EXIT_INTERRUPTED: i32 = 130;

static REQUESTED: AtomicBool = AtomicBool::new(false);
static INSTALLED: Mutex<bool> = Mutex::new(false);

/// Says whether the user or the system asked this process to stop.
///
/// After [`StopFlag::install`] the first SIGINT, SIGTERM or SIGHUP only raises the flag, so that a training loop
/// can finish its step and save; a second one ends the process at once with code 130.
#[derive(Debug, Clone, Copy)]
pub struct StopFlag(());

impl StopFlag {
    /// Installs the signal handler; later calls share the first one's.
    ///
    /// # Errors
    /// When the system refuses, or other code in this process has already installed a handler.
    pub fn install() -> Result<Self> {
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if !*installed {
            ctrlc::try_set_handler(|| {
                if REQUESTED.swap(true, Ordering::SeqCst) {
                    std::process::exit(EXIT_INTERRUPTED);
                }
                eprintln!("stopping after this step; press Ctrl-C again to stop at once");
            })?;
            *installed = true;
        }
        Ok(Self(()))
    }

    /// Whether a stop was asked for.
    #[must_use]
    pub fn requested(&self) -> bool {
        REQUESTED.load(Ordering::SeqCst)
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

    fn wait_for_flag(flag: StopFlag) {
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
            StopFlag::install().unwrap();
            assert!(!flag.requested());
            eprintln!("ready");
            wait_for_flag(flag);
            eprintln!("requested");
            std::thread::sleep(PATIENCE);
            return;
        }
        let mut process = child(NAME, std::path::Path::new("."), ":")
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
