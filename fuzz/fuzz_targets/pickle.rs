//! Any bytes as the pickle of a torch file: an error or values, whose tensors stay in their storages.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pickle::{Pickle, Value};

// Not through its crate, which would bring libtorch.
#[allow(dead_code)]
#[path = "../../runtime/src/pickle.rs"]
mod pickle;

fuzz_target!(|bytes: &[u8]| {
    let Ok(pickle) = Pickle::parse(bytes) else { return };
    for (_, value) in pickle.members(pickle.root()) {
        if let Value::Tensor(tensor) = value
            && let Some(span) = tensor.span()
        {
            assert!(tensor.offset + span <= tensor.storage.len);
        }
    }
});
