//! Everything that a training step changes, in and out of checkpoints.

use std::fs;
use std::path::Path;

use m6_data::SkipCounts;
use m6_run::write_atomic;
use m6_runtime::optim::{Ema, Optimizer};
use m6_runtime::{Params, read_tensors, write_tensors};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use super::codebook::Codebook;
use super::config::TrainConfig;
use super::critic::Critic;
use crate::error::{Result, VqganError};
use crate::model::Vqgan;

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const AVERAGE: &str = "average.safetensors";
const CODEBOOK_USAGE: &str = "codebook-usage.safetensors";
const DISCRIMINATOR: &str = "discriminator.safetensors";
const DISCRIMINATOR_OPTIMIZER: &str = "discriminator-optimizer.safetensors";
const POSITION: &str = "position.json";

/// Where in the data a run is. Random numbers need no state: those of a step follow from the seed and the step, those
/// of a sample from the seed and its ordinal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Position {
    /// Ordinal of the next sample.
    pub(super) next_ordinal: u64,
    /// Samples that could not be used so far.
    pub(super) samples: SkipCounts,
    /// Fingerprint of the samples and their order.
    pub(super) data: String,
}

/// Model, averages, optimizers, codebook, discriminator.
#[derive(Debug)]
pub(super) struct State {
    params: Params,
    pub(super) model: Vqgan,
    pub(super) optimizer: Optimizer,
    pub(super) ema: Ema,
    pub(super) codebook: Codebook,
    pub(super) critic: Option<Critic>,
}

impl State {
    /// The state before the first step.
    pub(super) fn new(config: &TrainConfig, device: Device) -> Result<Self> {
        let params = Params::new(device, config.seed);
        let model = Vqgan::new(&params, &config.model);
        if let Some(dir) = &config.init {
            model.load_weights(dir)?;
        }
        let ema = Ema::new(&params, config.ema);
        let codebook = Codebook::new(config, &model, &ema, device);
        let optimizer = Optimizer::new(&params, config.optimizer);
        let critic = config.discriminator.map(|d| Critic::new(d, config.schedule.steps, device, config.seed));
        Ok(Self { params, model, optimizer, ema, codebook, critic })
    }

    /// Number of trained values of the model.
    pub(super) fn parameters(&self) -> usize {
        self.params.count()
    }

    /// Runs `work` with the averaged weights in the model.
    pub(super) fn with_averages<T>(&mut self, work: impl FnOnce(&Vqgan) -> T) -> T {
        self.ema.swap();
        let result = work(&self.model);
        self.ema.swap();
        result
    }

    /// Writes a checkpoint into `dir`.
    pub(super) fn save(&self, dir: &Path, position: &Position) -> Result<()> {
        self.params.save(&dir.join(MODEL), Kind::Float)?;
        self.codebook.params.save(&dir.join(CODEBOOK_USAGE), Kind::Float)?;
        write_tensors(&dir.join(OPTIMIZER), &self.optimizer.state())?;
        write_tensors(&dir.join(AVERAGE), &self.ema.state())?;
        if let Some(critic) = &self.critic {
            critic.params.save(&dir.join(DISCRIMINATOR), Kind::Float)?;
            write_tensors(&dir.join(DISCRIMINATOR_OPTIMIZER), &critic.optimizer.state())?;
        }
        let path = dir.join(POSITION);
        let json = serde_json::to_vec(position).map_err(|error| VqganError::model(&path, error))?;
        Ok(write_atomic(path, &json)?)
    }

    /// Takes the checkpoint in `dir`, of a run on the samples that have the fingerprint `data`.
    pub(super) fn load(&mut self, dir: &Path, data: &str) -> Result<Position> {
        let path = dir.join(POSITION);
        let json = fs::read(&path).map_err(|error| VqganError::model(&path, error))?;
        let position: Position =
            serde_json::from_slice(&json).map_err(|error| VqganError::model(&path, error))?;
        if position.data != data {
            let problem = "data.shards: the samples are not those with which the run was started (keys, sizes or order \
                           differ, or a shard could not be read then or now)";
            return Err(VqganError::model(&path, problem));
        }
        self.params.load(&dir.join(MODEL), Kind::Float)?;
        self.codebook.params.load(&dir.join(CODEBOOK_USAGE), Kind::Float)?;
        self.optimizer.load_state(read_tensors(&dir.join(OPTIMIZER))?)?;
        self.ema.load_state(read_tensors(&dir.join(AVERAGE))?)?;
        if let Some(critic) = &mut self.critic {
            critic.params.load(&dir.join(DISCRIMINATOR), Kind::Float)?;
            critic.optimizer.load_state(read_tensors(&dir.join(DISCRIMINATOR_OPTIMIZER))?)?;
        }
        Ok(position)
    }
}
