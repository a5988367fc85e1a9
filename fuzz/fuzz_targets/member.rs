//! Any bytes as a label, a NumPy array and tensors: an error or arrays of as many bytes as their shapes say.
#![no_main]

use libfuzzer_sys::fuzz_target;
use m6_data::Array;
use m6_data::member::{read_class, read_safetensors};

fuzz_target!(|bytes: &[u8]| {
    let check = |array: &Array| {
        assert_eq!(array.bytes.len(), array.element.size() * array.shape.iter().product::<usize>());
    };
    let _ = read_class(bytes);
    if let Ok(array) = Array::read_npy(bytes) {
        check(&array);
    }
    if let Ok(tensors) = read_safetensors(bytes) {
        tensors.values().for_each(check);
    }
});
