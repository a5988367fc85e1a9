//! What every training run shares: config, run folder, checkpoints, schedules, metrics, progress, signals.
//!
//! Plain files, numbers and text: nothing here knows a tensor. The trainers of the image tokenizer and of the
//! transformer both stand on it.

pub mod atomic;
pub mod chart;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod metrics;
pub mod progress;
pub mod run_dir;
pub mod schedule;
pub mod signal;
pub mod tensorboard;

#[cfg(test)]
mod testing;

pub use atomic::write_atomic;
pub use checkpoint::Checkpoints;
pub use error::{Result, RunError};
pub use metrics::{MetricLog, MetricRow, read_metrics};
pub use progress::{Progress, Task, fetching};
pub use run_dir::RunDir;
pub use schedule::Schedule;
pub use signal::StopFlag;
