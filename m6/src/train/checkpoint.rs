//! Everything that a run needs to go on as if it had never stopped.

use std::fs;
use std::path::Path;

use m6_runtime::device::{rng_state, set_rng_state};
use m6_runtime::optim::{AdamW, Ema};
use m6_runtime::{Params, read_tensors, write_tensors};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const EMA: &str = "ema.safetensors";
const RNG: &str = "rng.safetensors";
const STATE: &str = "state.json";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Ordinal of the next example.
    position: u64,
}

/// Writes a checkpoint into an empty folder.
pub(super) fn write(dir: &Path, params: &Params, optimizer: &AdamW, ema: &Ema, position: u64) -> Result<()> {
    params.save(&dir.join(MODEL), Kind::Float)?;
    write_tensors(&dir.join(OPTIMIZER), &optimizer.state())?;
    write_tensors(&dir.join(EMA), &ema.state())?;
    let mut rng = vec![("cpu".to_string(), rng_state(Device::Cpu)?)];
    if params.device().is_cuda() {
        rng.push(("cuda".to_string(), rng_state(params.device())?));
    }
    write_tensors(&dir.join(RNG), &rng)?;
    let text = serde_json::to_string(&State { position }).expect("numbers become JSON");
    fs::write(dir.join(STATE), text).map_err(|error| Error::file(&dir.join(STATE), error))
}

/// Reads what [`write`] wrote; returns the ordinal of the next example.
pub(super) fn read(dir: &Path, params: &Params, optimizer: &mut AdamW, ema: &mut Ema) -> Result<u64> {
    params.load(&dir.join(MODEL), Kind::Float)?;
    let at = |name: &str| dir.join(name);
    let named = |path: &Path, error| Error::file(path, error);
    optimizer.load_state(read_tensors(&at(OPTIMIZER))?).map_err(|error| named(&at(OPTIMIZER), error))?;
    ema.load_state(read_tensors(&at(EMA))?).map_err(|error| named(&at(EMA), error))?;
    for (name, state) in read_tensors(&at(RNG))? {
        restore_rng(&name, &state, params.device())?;
    }
    let text = fs::read_to_string(at(STATE)).map_err(|error| Error::file(&at(STATE), error))?;
    let state: State = serde_json::from_str(&text).map_err(|error| Error::file(&at(STATE), error))?;
    Ok(state.position)
}

/// A run may go on on another kind of device; then there is no state for it, and its stream starts from the seed.
fn restore_rng(name: &str, state: &Tensor, device: Device) -> Result<()> {
    match name {
        "cpu" => Ok(set_rng_state(Device::Cpu, state)?),
        _ if device.is_cuda() => Ok(set_rng_state(device, state)?),
        _ => Ok(()),
    }
}
