//! Everything that a run needs to go on as if it had never stopped.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use m6_runtime::device::{rng_state, set_rng_state};
use m6_runtime::optim::{Ema, Optimizer};
use m6_runtime::{RuntimeError, read_tensors, write_tensors};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::feed::Place;
use super::window::Window;
use crate::error::{Error, Result};
use crate::model::{Model, ModelInfo};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const EMA: &str = "ema.safetensors";
const WINDOW: &str = "window.safetensors";
const RNG: &str = "rng.safetensors";
const STATE: &str = "state.json";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    place: Place,
    /// Fingerprint of each source's samples, by its name.
    data: BTreeMap<String, String>,
    /// Hash of the text tokenizer.
    tokenizer: String,
    /// Hash of the image tokenizer's weights.
    vqgan: String,
}

/// Writes a checkpoint into an empty folder.
pub(super) fn write(
    dir: &Path,
    model: &Model,
    data: &BTreeMap<String, String>,
    optimizer: &Optimizer,
    ema: &Ema,
    window: &Window,
    place: &Place,
) -> Result<()> {
    model.params.save(&dir.join(MODEL), Kind::Float)?;
    write_tensors(&dir.join(OPTIMIZER), &optimizer.state())?;
    write_tensors(&dir.join(EMA), &ema.state())?;
    write_tensors(&dir.join(WINDOW), &window.state())?;
    let mut rng = vec![("cpu".to_string(), rng_state(Device::Cpu)?)];
    if model.params.device().is_cuda() {
        rng.push(("cuda".to_string(), rng_state(model.params.device())?));
    }
    write_tensors(&dir.join(RNG), &rng)?;
    let ModelInfo { tokenizer, vqgan, .. } = model.info.clone();
    let text = serde_json::to_string(&State { place: place.clone(), data: data.clone(), tokenizer, vqgan })
        .expect("plain values become JSON");
    fs::write(dir.join(STATE), text).map_err(|error| Error::file(&dir.join(STATE), error))
}

/// Reads what [`write`] wrote.
///
/// # Errors
/// When a file does not fit the model, the model has other tokenizers than it was trained with, or a source other samples.
pub(super) fn read(
    dir: &Path,
    model: &Model,
    data: &BTreeMap<String, String>,
    optimizer: &mut Optimizer,
    ema: &mut Ema,
    window: &mut Window,
) -> Result<Place> {
    let at = |name: &str| dir.join(name);
    let text = fs::read_to_string(at(STATE)).map_err(|error| Error::file(&at(STATE), error))?;
    let state: State = serde_json::from_str(&text).map_err(|error| Error::file(&at(STATE), error))?;
    for (what, found, expected) in [
        ("text tokenizer", &model.info.tokenizer, &state.tokenizer),
        ("image tokenizer", &model.info.vqgan, &state.vqgan),
    ] {
        if found != expected {
            let problem = format!(
                "the run's {what} (hash {found}) is not the one that it was started with ({expected})"
            );
            return Err(Error::file(dir, problem));
        }
    }
    if let Some((name, _)) = state.data.iter().find(|(name, identity)| data.get(*name) != Some(identity)) {
        let problem = format!(
            "data.sources.{name}: its samples are not those with which the run was started (keys, sizes or order \
             differ, or a shard could not be read then or now)"
        );
        return Err(Error::file(dir, problem));
    }
    model.params.load(&at(MODEL), Kind::Float)?;
    let named = |name: &str, error: RuntimeError| Error::file(&at(name), error);
    optimizer.load_state(read_tensors(&at(OPTIMIZER))?).map_err(|error| named(OPTIMIZER, error))?;
    ema.load_state(read_tensors(&at(EMA))?).map_err(|error| named(EMA, error))?;
    window.load_state(read_tensors(&at(WINDOW))?).map_err(|error| named(WINDOW, error))?;
    for (name, state) in read_tensors(&at(RNG))? {
        restore_rng(&name, &state, model.params.device())?;
    }
    Ok(state.place)
}

/// A run may go on on another kind of device; then there is no state for it, and its stream starts from the seed.
fn restore_rng(name: &str, state: &Tensor, device: Device) -> Result<()> {
    match name {
        "cpu" => Ok(set_rng_state(Device::Cpu, state)?),
        _ if device.is_cuda() => Ok(set_rng_state(device, state)?),
        _ => Ok(()),
    }
}
