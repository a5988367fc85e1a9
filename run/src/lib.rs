//! What every training run shares: config, run folder, checkpoints, schedules, metrics, progress.
